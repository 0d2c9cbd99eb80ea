package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"krgimage/configs"
)

func (a *app) initCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "init",
		Short: "Write a commented cluster.yaml that works unchanged",
		Long: `Write a configuration with every setting, its default and what it means.
It works unchanged; an existing file is never overwritten.`,
		Example: "  krgimage init\n  krgimage init --config lab/cluster.yaml",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := writeNew(a.configFile, configs.Template()); err != nil {
				return err
			}
			fmt.Fprintf(a.Out, "wrote %s\nnext: 'krgimage trial' boots it in QEMU, 'krgimage build' makes the image for real machines\n", a.configFile)
			return nil
		},
	}
}

// writeNew writes a file that must not exist yet.
func writeNew(file string, data []byte) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s exists already and was left as it is: edit it, or choose another name with --config", file)
	}
	if err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}
