package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"krgimage/configs"
	"krgimage/images"
	"krgimage/images/progress"
	"krgimage/nfsroot/live"
	"krgimage/node/trial"
)

// trialDir is the trial's part of a state directory. Its head node has its own
// node table there, so that a trial never takes the ids of real machines.
func trialDir(state string) string { return filepath.Join(state, "trial") }

// trialFlags are the settings of one trial.
type trialFlags struct {
	nodes    int
	memory   string
	cpus     int
	uefi     bool
	console  bool
	keep     bool
	capture  string
	asJSON   bool
	detached string // progress style of the process that --keep leaves behind
}

func (a *app) trialCommand() *cobra.Command {
	var f trialFlags
	cmd := &cobra.Command{
		Use:   "trial",
		Short: "Boot a whole cluster in QEMU on this machine",
		Long: `Boot QEMU machines from the network, as real ones would: DHCP, TFTP, HTTP and
NFS come from a head node inside this process, over a network that exists only
there. The host's network stays untouched. What is missing (cluster.yaml, the
image) is made first.

It needs no privilege: run by an ordinary user, the shared root still has files
of root and of every user, whose owners are kept beside them. Such a root stays
with the user who made it; use another state directory for trials as root.

The cluster runs until Ctrl-C; with --keep it goes on in the background until
'krgimage trial stop'. Log in with 'krgimage ssh [node]', or with any ssh client
on the loopback ports that are printed.`,
		Example: `  krgimage trial
  krgimage trial --nodes 3 --memory 1GiB
  krgimage trial --uefi --keep
  krgimage trial stop`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.loadOrInit()
			if err != nil {
				return err
			}
			if err := f.apply(&c, cmd); err != nil {
				return usageError{err}
			}
			if f.keep {
				return a.keepTrial(cmd.Context(), c, f)
			}
			return a.runTrial(cmd.Context(), c, f)
		},
	}
	flags := cmd.Flags()
	flags.IntVarP(&f.nodes, "nodes", "n", 0, "number of QEMU `machines` (default: trial.nodes)")
	flags.StringVarP(&f.memory, "memory", "m", "", "memory of each machine, for example `512MiB` (default: trial.memory)")
	flags.IntVar(&f.cpus, "cpus", 0, "virtual `CPUs` of each machine (default: trial.cpus)")
	flags.BoolVar(&f.uefi, "uefi", false, "boot with UEFI firmware and its own network boot instead of BIOS")
	flags.BoolVar(&f.console, "console", false, "show what the machines print on their consoles")
	flags.BoolVar(&f.keep, "keep", false, "leave the cluster running in the background when it is ready")
	flags.StringVar(&f.capture, "pcap", "", "write every frame of the cluster's network to this `file`")
	flags.BoolVar(&f.asJSON, "json", false, "report progress as JSON objects, one a line")
	flags.StringVar(&f.detached, "detached", "", "")
	flags.Lookup("detached").Hidden = true
	cmd.AddCommand(a.trialStatusCommand(), a.trialStopCommand(), a.trialConsoleCommand(), a.trialPowerCommand())
	return cmd
}

// apply overrides the configuration with the flags that were given.
func (f *trialFlags) apply(c *configs.Cluster, cmd *cobra.Command) error {
	changed := cmd.Flags().Changed
	if changed("nodes") {
		c.Trial.Nodes = f.nodes
	}
	if changed("memory") {
		if err := c.Trial.Memory.UnmarshalText([]byte(f.memory)); err != nil {
			return fmt.Errorf("--memory: %w", err)
		}
	}
	if changed("cpus") {
		c.Trial.CPUs = f.cpus
	}
	machines, err := trial.Plan(*c, c.Trial.Nodes)
	if err != nil {
		return err
	}
	c.Nodes.Table = trial.Table(machines)
	// The firmware of an ordinary PC is no iPXE, while QEMU's BIOS ROM is one
	// that could skip TFTP: the trial goes the PC's way.
	c.Boot.Chain = "always"
	// A trial's network leads nowhere, so it serves the root itself.
	if c.NFSRoot.External() {
		c.NFSRoot = configs.Default().NFSRoot
	}
	return c.Validate()
}

// style is how the machines' progress is shown.
func (f *trialFlags) style(a *app) progress.Style {
	switch {
	case f.asJSON || f.detached == "json":
		return progress.JSON
	case f.console: // a live display would be torn apart by console lines
		return progress.Plain
	case f.detached == "terminal" || f.detached == "" && isTerminal(a.Out):
		return progress.Terminal
	}
	return progress.Plain
}

// runTrial runs the cluster until the context ends.
func (a *app) runTrial(ctx context.Context, c configs.Cluster, f trialFlags) error {
	state, err := a.state()
	if err != nil {
		return err
	}
	if err := refuseSecondTrial(ctx, state); err != nil {
		return err
	}
	if err := live.Preflight(state); err != nil {
		return err
	}
	style := f.style(a)
	report := progress.New(a.Out, style)
	if err := a.buildIfMissing(ctx, c, state, report); err != nil {
		return err
	}
	im, err := checkedImage(state, report)
	if err != nil {
		return err
	}
	machines, err := trial.Plan(c, c.Trial.Nodes)
	if err != nil {
		return err
	}
	var capture io.Writer
	if f.capture != "" {
		file, err := os.Create(f.capture)
		if err != nil {
			return fmt.Errorf("--pcap: %w", err)
		}
		defer file.Close()
		capture = file
	}
	cluster, err := trial.New(ctx, trial.Options{
		Dir: trialDir(state), Session: c.SessionID, Machines: machines,
		Memory: int64(c.Trial.Memory), CPUs: c.Trial.CPUs, UEFI: f.uefi,
		Head: netip.PrefixFrom(c.Network.Head, c.Network.Subnet.Bits()), Capture: capture,
		Grace: 10 * time.Second, Out: a.Out, Style: style, Log: a.logger(slog.LevelWarn),
		Ready: func(r trial.Report) {
			if f.detached == "" && !f.asJSON {
				a.printReady(c, r)
				fmt.Fprintln(a.Out, "Ctrl-C stops the cluster")
			}
		},
	})
	if err != nil {
		return err
	}
	defer cluster.Close()
	if style != progress.JSON {
		fmt.Fprintf(a.Out, "QEMU runs with %s: %s\n", cluster.Accel().Name, firstClause(cluster.Accel().Reason))
	}
	// The kernel tests whether timer interrupts arrive as fast as they should,
	// and panics if not; an emulated machine on a busy host is not that fast.
	if !cluster.Accel().Hardware() {
		c.Kernel.Args = append(slices.Clip(c.Kernel.Args), "no_timer_check")
	}
	h, err := a.openHead(ctx, c, im, headOptions{
		command: "trial", state: trialDir(state), network: cluster.Network(), log: a.logger(slog.LevelWarn), report: report,
	})
	if err != nil {
		return err
	}
	defer h.Close()
	if f.console {
		a.showConsoles(ctx, cluster)
	}
	err = cluster.Run(ctx, trialHead{h})
	if isStopped(ctx, err) {
		if style != progress.JSON {
			fmt.Fprintln(a.Out, "the cluster is stopped")
		}
		return nil
	}
	return err
}

// firstClause cuts a long reason after what people need of it.
func firstClause(reason string) string {
	short, _, _ := strings.Cut(reason, ";")
	return short
}

// buildIfMissing makes the image when there is none, or when the configuration
// or this krgimage asks for another one; what didn't change takes no time.
func (a *app) buildIfMissing(ctx context.Context, c configs.Cluster, state string, report *progress.Reporter) error {
	_, err := images.Current(state)
	if err == nil || errors.Is(err, images.ErrNoImage) {
		_, err = a.build(ctx, c, nil, report)
	}
	return err
}

// trialHead shows the head node to the trial.
type trialHead struct{ *headNode }

// Watch implements trial.Head.
func (h trialHead) Watch(ctx context.Context) iter.Seq[trial.Boot] {
	return func(yield func(trial.Boot) bool) {
		for n := range h.Nodes().Watch(ctx) {
			if n.Boot == nil {
				continue
			}
			boot := trial.Boot{MAC: string(n.MAC), Started: n.Boot.Started}
			for _, e := range n.Boot.Events {
				boot.Events = append(boot.Events, trial.Event{Stage: string(e.Stage), At: e.At, Detail: e.Detail})
			}
			if !yield(boot) {
				return
			}
		}
	}
}

// printReady says how to get in.
func (a *app) printReady(c configs.Cluster, r trial.Report) {
	fmt.Fprintf(a.Out, "\ncluster %s is ready (session %d, nodes: %d)\n", c.Name, c.SessionID, len(r.Nodes))
	config, err := a.writeSSHConfig(c, r)
	if err != nil {
		fmt.Fprintf(a.Err, "krgimage: %v\n", err)
	}
	for _, n := range r.Nodes {
		fmt.Fprintf(a.Out, "  node %-3d ssh -F %s %s   (%s port %d)\n", n.ID, config, n.Hostname, n.SSHHost(), n.SSHPort())
	}
	fmt.Fprintln(a.Out, "'krgimage ssh' does the same; 'krgimage ssh --user root 2' is root on node 2")
}

// writeSSHConfig writes an ssh_config(5) with the machines' names, for any
// program that uses ssh, and returns its path.
func (a *app) writeSSHConfig(c configs.Cluster, r trial.Report) (string, error) {
	state, err := a.state()
	if err != nil {
		return "", err
	}
	key, _, err := clientKey(state)
	if err != nil {
		return "", err
	}
	var text strings.Builder
	for _, n := range r.Nodes {
		fmt.Fprintf(&text, "Host %s\n  HostName %s\n  Port %d\n", n.Hostname, n.SSHHost(), n.SSHPort())
	}
	fmt.Fprintf(&text, "Host *\n  User %s\n  IdentityFile \"%s\"\n  IdentitiesOnly yes\n  HostKeyAlias %s\n  UserKnownHostsFile \"%s\"\n",
		defaultUser(c), key, hostAlias, knownHosts(state))
	file := filepath.Join(state, "ssh", "config")
	if err := renameio.WriteFile(file, []byte(text.String()), 0o644); err != nil {
		return "", fmt.Errorf("write an ssh configuration for the trial: %w", err)
	}
	return file, nil
}
