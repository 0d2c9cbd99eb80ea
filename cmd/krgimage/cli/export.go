package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"
	"github.com/klauspost/compress/zstd"
	"github.com/spf13/cobra"

	"krgimage/configs"
)

func (a *app) exportCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "export",
		Short: "Pack what was built for other machines",
		Args:  knownCommand,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.exportRootfsCommand())
	return cmd
}

func (a *app) exportRootfsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rootfs FILE",
		Short: "Pack the shared root for an existing NFS server",
		Long: `Write the shared root of the current image, with the accounts and keys of
cluster.yaml, to an archive (tar, compressed with zstd), for an NFS server whose
directory this machine can't mount. Owners, modes and links are kept. What people
made on a running cluster is not in it.

With a directory that is mounted here there is nothing to pack: name it in
nfsroot.mounted, and build and serve keep the root there up to date.`,
		Example: `  krgimage export rootfs root.tar.zst`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{fmt.Errorf("%s takes the name of the file to write; see '%s --help'", cmd.CommandPath(), cmd.CommandPath())}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.load()
			if err != nil {
				return err
			}
			if err := requireRoot("export rootfs"); err != nil {
				return err
			}
			return a.exportRootfs(cmd.Context(), c, args[0])
		},
	}
}

func (a *app) exportRootfs(ctx context.Context, c configs.Cluster, file string) error {
	state, err := a.state()
	if err != nil {
		return err
	}
	report := a.reporter(false)
	im, err := checkedImage(state, report)
	if err != nil {
		return err
	}
	trees, err := os.MkdirTemp(state, "export-")
	if err != nil {
		return fmt.Errorf("unpack the root: %w", err)
	}
	defer os.RemoveAll(trees)
	root, err := a.syncRoot(ctx, c, state, trees, im, headOptions{log: a.logger(slog.LevelWarn), report: report})
	if err != nil {
		return err
	}
	step := report.Step("Archive")
	if err := pack(ctx, root.Dir, file); err != nil {
		return step.Fail(err)
	}
	step.Done("%s", file)
	fmt.Fprintf(a.Out, `%s holds the root of image %s. On the NFS server, as root:
  mkdir DIRECTORY
  tar --zstd --numeric-owner --xattrs --xattrs-include='*' -xpf %s -C DIRECTORY
Export DIRECTORY to the nodes read-write with root as root (no_root_squash), name
it in nfsroot.path, then start 'krgimage serve'.
`, file, im.Manifest.BuildID, filepath.Base(file))
	return nil
}

// pack writes the tree to the file, which is there whole or not at all.
func pack(ctx context.Context, dir, file string) error {
	out, err := renameio.NewPendingFile(file, renameio.WithPermissions(0o600)) // it holds the nodes' host key
	if err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	defer out.Cleanup()
	z, err := zstd.NewWriter(out)
	if err != nil {
		return err
	}
	var errs bytes.Buffer
	tar := exec.CommandContext(ctx, "tar", "-C", dir, "--numeric-owner", "--sort=name", "--xattrs", "--xattrs-include=*", "--one-file-system", "-cf", "-", ".")
	tar.Stdout, tar.Stderr = z, &errs
	tar.Env = append(os.Environ(), "LC_ALL=C")
	if err := tar.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("archive: tar: %w: %s", err, strings.TrimSpace(errs.String()))
	}
	if err := errors.Join(z.Close(), out.CloseAtomicallyReplace()); err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	return nil
}
