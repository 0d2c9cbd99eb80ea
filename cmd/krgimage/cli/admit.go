package cli

import (
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"krgimage/configs"
)

func (a *app) admitCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "admit MAC|ID",
		Short: "Let a machine into the cluster",
		Long: `Let a machine into the cluster: one that waits (nodes.unknown: manual), one that
was revoked, or one that will be switched on later. It gets a node id if it has
none. A machine that waits in its firmware asks again by itself or after a reset.

For a machine that is in already but lost its identity, it allows a new one
without a reboot.`,
		Example: "  krgimage nodes admit 52:54:00:4b:52:01\n  krgimage nodes admit 3",
		Args:    exactlyOne("MAC or node id"),
		RunE: func(cmd *cobra.Command, args []string) error {
			mac, id, err := parseMachine(args[0])
			if err != nil {
				return err
			}
			state, err := a.state()
			if err != nil {
				return err
			}
			client, err := dialHead(cmd.Context(), state)
			if err != nil {
				return err
			}
			defer client.Close()
			n, err := client.Admit(cmd.Context(), mac, id)
			if err != nil {
				return fmt.Errorf("admit %s: %w", args[0], err)
			}
			fmt.Fprintf(a.Out, "node %d (%s, %s) is admitted\n", n.ID, n.Hostname, n.MAC)
			return nil
		},
	}
}

func (a *app) revokeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "revoke MAC|ID",
		Short: "Lock a machine out of the cluster",
		Long: `Lock a machine out of the cluster at once and until it is admitted again. Its
certificate is refused, its connections to the head node end, its lease isn't
renewed and it can't boot. The others treat it as a dead node.

Its node id stays its own. The machine itself is not switched off; 'krgadm nodes
del' takes a healthy node out of the cluster in order.`,
		Example: "  krgimage nodes revoke 3",
		Args:    exactlyOne("MAC or node id"),
		RunE: func(cmd *cobra.Command, args []string) error {
			mac, id, err := parseMachine(args[0])
			if err != nil {
				return err
			}
			state, err := a.state()
			if err != nil {
				return err
			}
			client, err := dialHead(cmd.Context(), state)
			if err != nil {
				return err
			}
			defer client.Close()
			n, err := client.Revoke(cmd.Context(), mac, id)
			if err != nil {
				return fmt.Errorf("revoke %s: %w", args[0], err)
			}
			fmt.Fprintf(a.Out, "node %d (%s, %s) is revoked\n", n.ID, n.Hostname, n.MAC)
			return nil
		},
	}
}

// exactlyOne is the check of a command with one argument.
func exactlyOne(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("'%s' needs one argument, a %s; 'krgimage nodes' shows both", cmd.CommandPath(), what)
		}
		return nil
	}
}

// parseMachine reads a node id or a MAC.
func parseMachine(text string) (mac configs.MAC, id int, err error) {
	if id, err := strconv.Atoi(text); err == nil {
		if id < 0 || id > configs.MaxNodeID {
			return "", 0, fmt.Errorf("node id %d is not in 0..%d", id, configs.MaxNodeID)
		}
		return "", id, nil
	}
	if err := mac.UnmarshalText([]byte(text)); err != nil {
		return "", 0, fmt.Errorf("%q is neither a node id nor a MAC such as 52:54:00:4b:52:01", text)
	}
	return mac, 0, nil
}
