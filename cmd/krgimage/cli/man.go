package cli

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"krgimage/configs/version"
	"krgimage/images"
)

func (a *app) manCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:     "man",
		Short:   "Write the manual pages of all commands",
		Example: "  krgimage man --dir /usr/local/share/man/man1",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return fmt.Errorf("write manual pages: %w", err)
			}
			date := images.DefaultEpoch
			header := &doc.GenManHeader{Section: "1", Source: "krgimage " + version.Version, Manual: "krgimage", Date: &date}
			return doc.GenManTree(cmd.Root(), header, dir)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "man", "`directory` to write to")
	return cmd
}
