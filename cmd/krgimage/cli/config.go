package cli

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"krgimage/configs"
)

func (a *app) configCommand() *cobra.Command {
	var asJSON bool
	show := &cobra.Command{
		Use:   "show",
		Short: "Print the whole configuration with every default filled in",
		Args:  noArgs,
		RunE: func(*cobra.Command, []string) error {
			c, err := a.load()
			if err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(a.Out)
				enc.SetIndent("", "  ")
				return enc.Encode(c)
			}
			text, err := configs.Show(c)
			if err != nil {
				return err
			}
			_, err = a.Out.Write(text)
			return err
		},
	}
	show.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	schema := &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON schema of cluster.yaml, for editors and checkers",
		Args:  noArgs,
		RunE: func(*cobra.Command, []string) error {
			text, err := configs.Schema()
			if err != nil {
				return err
			}
			_, err = a.Out.Write(text)
			return err
		},
	}
	check := &cobra.Command{
		Use:   "check",
		Short: "Check the configuration and say every mistake with its line",
		Args:  noArgs,
		RunE: func(*cobra.Command, []string) error {
			if _, err := a.load(); err != nil {
				return err
			}
			fmt.Fprintf(a.Out, "%s is fine\n", a.configFile)
			return nil
		},
	}
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Show or check the configuration",
		Long:  "Show the configuration with all defaults, check it, or print its JSON schema.",
		Args:  knownCommand,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(show, check, schema)
	return cmd
}
