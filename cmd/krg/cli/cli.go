// Package cli decides what krg is, by the name it was called with:
//
//	/init           stage 1 of the boot, as PID 1 in the initramfs
//	init            PID 1 of the node's host part
//	krginit         init of the container, if it is PID 1 there
//	migrate, ...    a command of Kerrighed (package kerrighed)
//	krg             commands for people on a node
package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"krgimage/configs/version"
	"krgimage/node/container"
	"krgimage/node/control"
	"krgimage/node/kerrighed"
	"krgimage/node/pid1"
	"krgimage/node/settings"
	"krgimage/node/stage1"
)

// Main runs what args[0] names and returns the exit status.
func Main(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		args = []string{"krg"}
	}
	name := filepath.Base(args[0])
	isInit := os.Getpid() == 1
	switch {
	case args[0] == "/init" && isInit:
		stage1.Main(version.Version)
	case name == "init" && isInit:
		pid1.Main(version.Version)
	case name == "init":
		fmt.Fprintln(stderr, "init: only the kernel starts this; use 'krg poweroff' or 'krg reboot'")
		return 1
	case name == container.Name && container.IsInit():
		return container.Main(stdout)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if tool, ok := kerrighed.Find(name); ok {
		return tool.Run(ctx, args[1:], stdout, stderr)
	}
	root := Root()
	root.SetArgs(args[1:])
	root.SetOut(stdout)
	root.SetErr(stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(stderr, "krg:", err)
		return 1
	}
	return 0
}

// Root builds the command tree of krg.
func Root() *cobra.Command {
	root := &cobra.Command{
		Use:           "krg",
		Short:         "Show and control this cluster node",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(versionCommand(), node(), log(), down("poweroff", "Power this node off in order"), down("reboot", "Reboot this node in order"))
	return root
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of krg",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			kerrighed.WriteVersion(cmd.OutOrStdout(), "krg")
			return nil
		},
	}
}

// socketPaths are where the control socket is, in the host part and in the
// container.
func socketPaths() []string {
	return []string{filepath.Join(settings.SharedDir, settings.ControlSocket), filepath.Join(settings.RunDir, settings.ControlSocket)}
}

func node() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Print who this node is: ids, name, addresses, image",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := settings.LoadNode()
			if err != nil {
				return err
			}
			status := nodeStatus{Node: n}
			// Only root gets to know about services.
			if a, err := control.Call(cmd.Context(), control.Request{Command: "status"}, socketPaths()...); err == nil {
				for _, s := range a.Services {
					status.Services = append(status.Services, serviceStatus{s.Name, string(s.State), s.PID, s.Starts, s.LastExit})
				}
			}
			if asJSON {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(status)
			}
			_, err = io.WriteString(cmd.OutOrStdout(), status.text())
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// nodeStatus is what `krg node --json` prints.
type nodeStatus struct {
	settings.Node
	Services []serviceStatus `json:"services,omitempty"`
}

type serviceStatus struct {
	Name     string `json:"name"`
	State    string `json:"state"`
	PID      int    `json:"pid,omitempty"`
	Starts   int    `json:"starts"`
	LastExit string `json:"last_exit,omitempty"`
}

func (n nodeStatus) text() string {
	var b strings.Builder
	line := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%s: %s\n", key, value)
		}
	}
	line("session_id", fmt.Sprint(n.SessionID))
	line("node_id", fmt.Sprint(n.NodeID))
	line("hostname", n.Hostname)
	line("domain", n.Domain)
	line("addresses", strings.Join(n.Addresses, " "))
	line("interface", strings.TrimSpace(n.Interface+" "+n.MAC))
	line("head", n.Head)
	line("root", n.Root)
	line("image", strings.TrimSpace(n.Image.Name+" "+n.Image.Version+" "+n.Image.BuildID))
	line("kernel", n.Kernel)
	for _, s := range n.Services {
		text := fmt.Sprintf("%s, pid %d, started %d times", s.State, s.PID, s.Starts)
		if s.LastExit != "" {
			text += ", last " + s.LastExit
		}
		line(s.Name, text)
	}
	return b.String()
}

func log() *cobra.Command {
	return &cobra.Command{
		Use:   "log [SERVICE]",
		Short: "Print the last output of the container's services",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r := control.Request{Command: "log"}
			if len(args) > 0 {
				r.Service = args[0]
			}
			a, err := control.Call(cmd.Context(), r, socketPaths()...)
			if err != nil {
				return err
			}
			_, err = io.WriteString(cmd.OutOrStdout(), a.Log)
			return err
		},
	}
}

func down(name, short string) *cobra.Command {
	return &cobra.Command{
		Use:   name,
		Short: short,
		Long:  short + ": the container's processes end first, then data is written back.\nWorks for root, in the host part and in the container.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := control.Call(cmd.Context(), control.Request{Command: name}, socketPaths()...)
			return err
		},
	}
}
