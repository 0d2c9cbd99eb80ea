// Package cli is krgimage's command tree: one file a verb. The commands read
// flags and configuration, call the packages that do the work, and print what
// came of it; streams, arguments and the context are handed in, so tests run
// the whole program in process.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"krgimage/configs"
	"krgimage/configs/version"
	"krgimage/images/progress"
)

// Streams are the program's standard streams.
type Streams struct {
	In  io.Reader
	Out io.Writer
	Err io.Writer
}

// Run runs krgimage with the arguments (without the program's name) and
// returns the exit code: 0 done, 1 failed, 2 wrong usage.
func Run(ctx context.Context, s Streams, args []string) int {
	root := New(s)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var exit exitError
	if errors.As(err, &exit) {
		return int(exit)
	}
	fmt.Fprintf(s.Err, "krgimage: %v\n", err)
	var usage usageError
	if errors.As(err, &usage) {
		return 2
	}
	return 1
}

// exitError passes on the exit code of a program that krgimage ran.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// usageError marks errors in the arguments.
type usageError struct{ error }

// app holds what the commands share: streams and the global flags.
type app struct {
	Streams
	configFile string
	stateDir   string
	cacheDir   string
	verbose    bool
}

// New returns the command tree.
func New(s Streams) *cobra.Command {
	a := &app{Streams: s}
	root := &cobra.Command{
		Use:   "krgimage",
		Short: "Turn a pile of PCs into one computer",
		Long: `krgimage makes a bootable Kerrighed cluster of ordinary PCs or QEMU machines.

It builds a network-boot image from Debian packages (build), is the head node
that boots the machines (serve), and tries it all in QEMU on this machine with
one command (trial). Users log in to any node with ssh on port 2222.

Start with:
  krgimage init       write a commented cluster.yaml
  krgimage trial      build what is missing and boot two QEMU nodes
  krgimage ssh        a shell in the cluster`,
		Version:       version.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          knownCommand,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetIn(s.In)
	root.SetOut(s.Out)
	root.SetErr(s.Err)
	root.SetVersionTemplate("krgimage {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see '%s --help'", err, cmd.CommandPath())}
	})
	flags := root.PersistentFlags()
	flags.StringVarP(&a.configFile, "config", "c", "cluster.yaml", "configuration `file`")
	flags.StringVar(&a.stateDir, "state", "", "`directory` of the image, the shared root and the node table (default: state beside the configuration)")
	flags.StringVar(&a.cacheDir, "cache", "", "`directory` of downloaded packages (default: krgimage in the user's cache directory)")
	flags.BoolVarP(&a.verbose, "verbose", "v", false, "log what happens inside")
	root.AddCommand(a.initCommand(), a.configCommand(), a.buildCommand(), a.serveCommand(), a.nodesCommand(), a.nfsCommand(), a.logsCommand(),
		a.trialCommand(), a.sshCommand(), a.exportCommand(), a.manCommand())
	return root
}

// load reads the configuration.
func (a *app) load() (configs.Cluster, error) { return configs.Load(a.configFile) }

// loadOrInit is load for `trial`, which goes from nothing to a cluster: a
// missing default configuration is written first.
func (a *app) loadOrInit() (configs.Cluster, error) {
	if _, err := os.Stat(a.configFile); errors.Is(err, fs.ErrNotExist) {
		if err := writeNew(a.configFile, configs.Template()); err != nil {
			return configs.Cluster{}, err
		}
		fmt.Fprintf(a.Err, "wrote %s with the defaults\n", a.configFile)
	}
	return a.load()
}

// state returns the absolute state directory.
func (a *app) state() (string, error) {
	dir := a.stateDir
	if dir == "" {
		dir = filepath.Join(filepath.Dir(a.configFile), "state")
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("state directory %s: %w", dir, err)
	}
	return abs, nil
}

// cache returns the directory of downloaded packages.
func (a *app) cache() (string, error) {
	if a.cacheDir != "" {
		return filepath.Abs(a.cacheDir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no place for downloaded packages (%w): give one with --cache", err)
	}
	return filepath.Join(dir, "krgimage"), nil
}

// logger logs to the error stream from the level on; everything with --verbose.
func (a *app) logger(level slog.Level) *slog.Logger {
	if a.verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: level}))
}

// reporter shows progress live on a terminal, and as JSON objects on the
// output when a script asked for them. Elsewhere it is quiet, unless --verbose
// asks for one line a step.
func (a *app) reporter(asJSON bool) *progress.Reporter {
	switch {
	case asJSON:
		return progress.New(a.Out, progress.JSON)
	case isTerminal(a.Err):
		return progress.New(a.Err, progress.Terminal)
	case a.verbose:
		return progress.New(a.Err, progress.Plain)
	}
	return progress.Discard()
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// knownCommand refuses the name of a command that doesn't exist.
func knownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := ""
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		hint = fmt.Sprintf("did you mean %s? ", strings.Join(near, " or "))
	}
	return usageError{fmt.Errorf("there is no command %q; %ssee '%s --help'", args[0], hint, cmd.CommandPath())}
}

// noArgs is cobra.NoArgs with a message that says what to do.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%s takes no argument, but got %q; see '%s --help'", cmd.CommandPath(), args[0], cmd.CommandPath())}
	}
	return nil
}
