package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"krgimage/pxe/head"
	"krgimage/pxe/nodes"
)

func (a *app) nodesCommand() *cobra.Command {
	var asJSON, timeline, follow bool
	cmd := &cobra.Command{
		Use:   "nodes",
		Short: "Show the machines the head node knows and how far each has booted",
		Long: `Show every known machine with its node id, address and last boot stage.
With --timeline each stage of the last boot has a line with its time since the
first packet of that boot. Works while 'serve' or 'trial' runs.`,
		Example: "  krgimage nodes\n  krgimage nodes --timeline\n  krgimage nodes --json | jq '.[].address'",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			state, err := a.state()
			if err != nil {
				return err
			}
			client, err := dialHead(cmd.Context(), state)
			if err != nil {
				return err
			}
			defer client.Close()
			if follow {
				return a.followNodes(cmd, client, asJSON)
			}
			list, err := client.Nodes(cmd.Context())
			if err != nil {
				return err
			}
			switch {
			case asJSON:
				enc := json.NewEncoder(a.Out)
				enc.SetIndent("", "  ")
				return enc.Encode(list)
			case len(list) == 0:
				fmt.Fprintln(a.Out, "no machine has asked for an address yet")
				return nil
			case timeline:
				return printTimelines(a.Out, list)
			}
			return printNodes(a.Out, list)
		},
	}
	cmd.AddCommand(a.admitCommand(), a.revokeCommand())
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON (with --follow one object a line)")
	cmd.Flags().BoolVarP(&timeline, "timeline", "t", false, "show every stage of the last boot")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "keep showing what changes")
	return cmd
}

// dialHead connects to the head node of a state directory: the one of `serve`,
// or else the one of the trial.
func dialHead(ctx context.Context, state string) (*head.Client, error) {
	client, err := head.Dial(ctx, state)
	if errors.Is(err, head.ErrNotRunning) {
		if client, err := head.Dial(ctx, trialDir(state)); err == nil {
			return client, nil
		}
	}
	return client, err
}

func (a *app) followNodes(cmd *cobra.Command, client *head.Client, asJSON bool) error {
	for n, err := range client.Watch(cmd.Context()) {
		if errors.Is(err, head.ErrNotRunning) {
			fmt.Fprintln(a.Err, "the head node has stopped")
			return nil
		}
		if err != nil {
			return err
		}
		if asJSON {
			line, err := json.Marshal(n)
			if err != nil {
				return err
			}
			fmt.Fprintf(a.Out, "%s\n", line)
			continue
		}
		stage, took, detail := lastStage(n)
		fmt.Fprintf(a.Out, "node %-3d %-12s %-15s %-10s %8s  %s\n", n.ID, n.Hostname, n.Address, stage, took, detail)
	}
	return nil
}

func printNodes(out io.Writer, list []nodes.Node) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tHOSTNAME\tADDRESS\tMAC\tSTAGE\tTIME\tDETAIL")
	for _, n := range list {
		stage, took, detail := lastStage(n)
		id, address := fmt.Sprint(n.ID), n.Address.String()
		if n.ID == nodes.NoID {
			id, address = "-", "-"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", id, cmp.Or(n.Hostname, "-"), address, n.MAC, stage, took, detail)
	}
	return w.Flush()
}

func printTimelines(out io.Writer, list []nodes.Node) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, n := range list {
		fmt.Fprintf(w, "node %d  %s  %s\n", n.ID, n.Hostname, n.Address)
		if n.Boot == nil {
			fmt.Fprintln(w, "  never booted")
			continue
		}
		for _, e := range n.Boot.Events {
			fmt.Fprintf(w, "  %s\t%s\t%s\n", e.Stage, seconds(n.Boot.Since(e)), e.Detail)
		}
	}
	return w.Flush()
}

// lastStage is how far a machine is: the stage, the time from the first packet
// of its boot to it, and the stage's detail.
func lastStage(n nodes.Node) (stage, took, detail string) {
	switch n.Admission {
	case nodes.Waiting:
		return "waiting", "", "krgimage nodes admit " + string(n.MAC)
	case nodes.Revoked:
		return "revoked", "", ""
	}
	if n.Boot == nil || len(n.Boot.Events) == 0 {
		return "never booted", "", ""
	}
	e := n.Boot.Events[len(n.Boot.Events)-1]
	return string(e.Stage), seconds(n.Boot.Since(e)), e.Detail
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }
