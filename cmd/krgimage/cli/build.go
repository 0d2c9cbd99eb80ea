package cli

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"krgimage/configs"
	"krgimage/configs/version"
	"krgimage/images"
	"krgimage/images/progress"
	"krgimage/initramfs"
	"krgimage/node/kerrighed"
)

func (a *app) buildCommand() *cobra.Command {
	var rebuild []string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "build",
		Short: "Build the boot image from Debian packages",
		Long: `Build the image that nodes boot: the Debian root, the signed kernel, the
stage-1 archive, the boot loaders, a manifest with digests and a bill of
materials.

Each part is made again only when its inputs changed. An interrupted or failed
build leaves the previous image as it was, and keeps the parts that were
finished. The same inputs give the same bytes; SOURCE_DATE_EPOCH sets the time
stamp of all files.

Where an existing NFS server has the shared root and nfsroot.mounted says where
its directory is on this machine, the image is installed there, too, unless a
head node is running: then the next start of 'krgimage serve' does it.

The Debian packages of an unchanged configuration stay the ones of the first
build: --rebuild packages takes what the mirror has today.`,
		Example: `  krgimage build
  krgimage build --rebuild packages --rebuild kernel   # take Debian's updates
  krgimage build --json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.load()
			if err != nil {
				return err
			}
			im, err := a.build(cmd.Context(), c, rebuild, a.reporter(asJSON))
			if err != nil {
				return err
			}
			if !asJSON {
				a.printImage(im)
			}
			return a.installRoot(cmd.Context(), c, im, a.reporter(asJSON))
		},
	}
	cmd.Flags().StringSliceVar(&rebuild, "rebuild", nil, "make this `part` even if nothing changed: all, "+strings.Join(images.Parts, ", "))
	cmd.Flags().BoolVar(&asJSON, "json", false, "report progress as JSON objects, one a line")
	return cmd
}

// build makes the image of the configuration in the state directory.
func (a *app) build(ctx context.Context, c configs.Cluster, rebuild []string, report *progress.Reporter) (*images.Image, error) {
	state, err := a.state()
	if err != nil {
		return nil, err
	}
	cache, err := a.cache()
	if err != nil {
		return nil, err
	}
	epoch, err := images.Epoch(os.Getenv("SOURCE_DATE_EPOCH"))
	if err != nil {
		return nil, err
	}
	krg, err := initramfs.Krg()
	if err != nil {
		return nil, err
	}
	rescue, err := initramfs.RescueCommands()
	if err != nil {
		return nil, err
	}
	source := images.NewDebianSource(c, cache, state, epoch, a.logger(slog.LevelWarn))
	defer source.Close()
	return images.Build(ctx, images.BuildOptions{
		State: state, Cluster: c, Source: source, Krg: krg, Rescue: rescue, Links: commandLinks(), Files: commandFiles(),
		Rebuild: rebuild, Epoch: epoch, Version: version.Version, Report: report,
	})
}

// commandLinks names krg after Kerrighed's commands, where users look for them.
func commandLinks() []images.Link {
	links := []images.Link{{Path: "/usr/bin/krg", Target: "../sbin/krg"}}
	for _, c := range kerrighed.Tools() {
		links = append(links, images.Link{Path: "/usr/" + c.Dir + "/" + c.Name, Target: relativeKrg(c.Dir)})
	}
	return links
}

// commandFiles are the manual pages and the bash completion of the commands.
func commandFiles() []images.File {
	var files []images.File
	for _, c := range kerrighed.Tools() {
		if c.Man != nil {
			files = append(files, images.File{Path: "/usr/share/man/man1/" + c.Name + ".1", Data: c.Man})
		}
		if c.Completion != nil {
			files = append(files, images.File{Path: "/usr/share/bash-completion/completions/" + c.Name, Data: c.Completion})
		}
	}
	return files
}

// relativeKrg is krg's path as seen from /usr/bin or /usr/sbin.
func relativeKrg(dir string) string {
	if dir == "sbin" {
		return "krg"
	}
	return "../sbin/krg"
}

func (a *app) printImage(im *images.Image) {
	fmt.Fprintf(a.Out, "image %s in %s\n", im.Manifest.BuildID, im.Dir)
	for _, f := range im.Manifest.Artefacts {
		fmt.Fprintf(a.Out, "  %-20s %10s  %s\n", f.Path, progress.Size(f.Size), f.SHA256[:16])
	}
	fmt.Fprintf(a.Out, "kernel %s, %d Debian packages\n", im.Manifest.Kernel.Release, im.Manifest.Packages)
}
