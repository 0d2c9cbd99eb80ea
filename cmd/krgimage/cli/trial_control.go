package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"krgimage/node/trial"
)

func (a *app) trialStatusCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the machines of the running trial",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			state, err := a.state()
			if err != nil {
				return err
			}
			r, err := trial.Status(cmd.Context(), trialDir(state))
			if err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(a.Out)
				enc.SetIndent("", "  ")
				return enc.Encode(r)
			}
			fmt.Fprintf(a.Out, "trial of process %d with %s\n", r.PID, r.Accel.Name)
			for _, n := range r.Nodes {
				fmt.Fprintf(a.Out, "  node %-3d %-12s %-15s %-10s %6.1f s  ssh port %d  %s\n", n.ID, n.Hostname, n.Address, n.Stage, n.Seconds, n.SSHPort(), n.Detail)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (a *app) trialStopCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "stop",
		Short: "Stop the running trial",
		Long:  "Shut the machines of the running trial down and end its head node.",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			state, err := a.state()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			if err := trial.Stop(ctx, trialDir(state)); err != nil {
				return err
			}
			fmt.Fprintln(a.Out, "the cluster is stopped")
			return nil
		},
	}
}

func (a *app) trialConsoleCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "console [node]",
		Short: "Attach to the serial console of a machine of the trial",
		Long:  "Show the serial console of a machine (default: 1) and type on it. End it with Ctrl-C.",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			state, err := a.state()
			if err != nil {
				return err
			}
			node := 1
			if len(args) > 0 {
				if node, err = strconv.Atoi(args[0]); err != nil {
					return usageError{fmt.Errorf("%q is no node id", args[0])}
				}
			}
			return trial.AttachConsole(cmd.Context(), trialDir(state), node, a.In, a.Out)
		},
	}
}

// powerActions are what `trial power` can do to a machine.
var powerActions = []string{"start", "powerdown", "reset", "kill", "pause", "resume", "unplug", "plug"}

func (a *app) trialPowerCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "power node action",
		Short: "Press the buttons of a machine of the trial, or pull its cable",
		Long: `Act on one machine from outside, to see how the cluster takes it:
  powerdown  press the power button: the node shuts down by itself
  start      switch it on again
  reset      press the reset button
  kill       cut its power
  pause      stop its processors; resume lets them go on
  unplug     pull its network cable; plug puts it back`,
		Example:   "  krgimage trial power 2 kill\n  krgimage trial power 2 start",
		Args:      cobra.ExactArgs(2),
		ValidArgs: powerActions,
		RunE: func(cmd *cobra.Command, args []string) error {
			state, err := a.state()
			if err != nil {
				return err
			}
			node, err := strconv.Atoi(args[0])
			if err != nil {
				return usageError{fmt.Errorf("%q is no node id", args[0])}
			}
			return trial.Control(cmd.Context(), trialDir(state), node, args[1])
		},
	}
}

// showConsoles prints the machines' serial lines with their names before them.
func (a *app) showConsoles(ctx context.Context, cluster *trial.Cluster) {
	var mu sync.Mutex
	for _, n := range cluster.Nodes() {
		out := &prefixWriter{mu: &mu, out: a.Out, prefix: n.Machine().Hostname + "| "}
		go n.Console().Attach(ctx, readWriter{blocked{ctx}, out})
	}
}

type readWriter struct {
	io.Reader
	io.Writer
}

// blocked is an input on which nobody types.
type blocked struct{ ctx context.Context }

func (b blocked) Read([]byte) (int, error) {
	<-b.ctx.Done()
	return 0, io.EOF
}

// prefixWriter puts a prefix before each line, and writes whole lines only.
type prefixWriter struct {
	mu     *sync.Mutex
	out    io.Writer
	prefix string
	line   []byte
}

func (w *prefixWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.line = append(w.line, p...)
	for {
		i := bytes.IndexByte(w.line, '\n')
		if i < 0 {
			return len(p), nil
		}
		fmt.Fprintf(w.out, "%s%s\n", w.prefix, bytes.TrimRight(w.line[:i], "\r"))
		w.line = w.line[i+1:]
	}
}
