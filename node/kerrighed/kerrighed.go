// Package kerrighed is the one table of the command names that Kerrighed 3
// brought: krg answers to each of them, the image builder links each to krg.
//
// A name whose service this release doesn't have says so and fails; its
// --help and --version work as they did, so that scripts which only look
// whether the tools are there go on.
package kerrighed

import (
	"context"
	"fmt"
	"io"
	"slices"

	"krgimage/configs/version"
	"krgimage/node/krgadm"
)

// Tool is one of Kerrighed's commands.
type Tool struct {
	Name     string
	Dir      string // below /usr: "bin" or "sbin"
	Synopsis string // usage, the part after the name
	About    string // one line for the help
	Service  string // what the tool needs and this release lacks; empty when it works

	Man        []byte // manual page, section 1
	Completion []byte // bash completion

	longOnly bool // the original knows only --version, no -v
	run      func(ctx context.Context, args []string, stdout, stderr io.Writer) int
}

// Tools lists all names in alphabetical order.
func Tools() []Tool {
	return []Tool{
		{Name: "checkpoint", Dir: "bin", Synopsis: "[-h|--help] [-q] [-f|--freeze] [-u[SIG]|--unfreeze[=SIG]] [-c|--ckpt-only] [-k[SIG]|--kill[=SIG]] [-a|--from-appid] [-d TEXT|--description TEXT] [-b|--no-callbacks] [-i|--ignore-unsupported-files] PID|APPID",
			About: "Save the state of a running application.", Service: "checkpoint service", longOnly: true},
		{Name: "ipccheckpoint", Dir: "bin", Synopsis: "-q|--queue|-s|--semaphore|-m|--memory ID FILE",
			About: "Save a System V IPC object to a file.", Service: "checkpoint service for IPC objects", longOnly: true},
		{Name: "ipcrestart", Dir: "bin", Synopsis: "-q|--queue|-s|--semaphore|-m|--memory FILE",
			About: "Make a System V IPC object again from a file.", Service: "checkpoint service for IPC objects", longOnly: true},
		{Name: "krg_legacy_scheduler", Dir: "sbin", Synopsis: "start|stop",
			About: "Set up the load balancer of the earlier releases.", Service: "cluster scheduler"},
		{Name: "krg_rbt_scheduler", Dir: "sbin", Synopsis: "start|stop",
			About: "Set up the response-time balancer.", Service: "cluster scheduler"},
		{Name: "krgadm", Dir: "sbin", Synopsis: "[-h|--help] [--version] cluster [status|poweroff|reboot] | nodes [status [-n|--nodes LIST]] | nodes add|del -n|--nodes LIST|-c|--count N|-t|--total N|-a|--all",
			About: "Show and change which nodes are in the cluster.", Man: krgadm.Man, Completion: krgadm.Completion, run: runKrgadm, longOnly: true},
		{Name: "krgboot", Dir: "sbin", Synopsis: "[-h] [-v] [-u] [-i] [-m] [-p] [-n] [-U] [--] HELPER [ARGS]",
			About: "Start the container of the cluster.", Service: "container start by hand: every node starts its own"},
		{Name: "krgboot_helper", Dir: "sbin", Synopsis: "",
			About: "Start the container as /sys/kerrighed/hotplug says.", Service: "container start by hand: every node starts its own"},
		{Name: "krgcapset", Dir: "bin", Synopsis: "[-h|--help] [-v|--version] [-s|--show] [-f|--force] [-k|--pid PID] [-p|--permitted SET] [-e|--effective SET] [-i|--inheritable-permitted SET] [-d|--inheritable-effective SET]",
			About: "Show and change what the cluster may do with a process.", Service: "capability sets"},
		{Name: "krgcr-run", Dir: "bin", Synopsis: "[-h] [-v] [-b] [-q] [-o FILE] -- PROGRAM [ARGS]",
			About: "Run a program that can be checkpointed.", Service: "checkpoint service"},
		{Name: "krginit", Dir: "sbin", Synopsis: "[-h] [-v] [-s SETSID] [-- PROGRAM [ARGS]]",
			About: "Be the init of a node's part of the container.", Service: "krginit outside of a new container"},
		{Name: "krginit_helper", Dir: "sbin", Synopsis: "[ARGS]",
			About: "Prepare a node's part of the container and start krginit.", Service: "container start by hand: every node starts its own"},
		{Name: "krglog", Dir: "sbin", Synopsis: "+epm|-epm|+faf|-faf ...",
			About: "Switch the explanations of migration on and off.", Service: "migration log"},
		{Name: "migrate", Dir: "bin", Synopsis: "[-h|--help] [-v|--version] PID NODEID",
			About: "Move a process to another node.", Service: "process migration"},
		{Name: "restart", Dir: "bin", Synopsis: "[-h|--help] [-v|--version] [-f|--foreground] [-t|--tty] [-p|--pids] [-s KEY,FD|--substitute-file KEY,FD] [-U|--no-unfreeze] [-q|--quiet] [-d|--debug] APPID VERSION",
			About: "Bring a checkpointed application back.", Service: "checkpoint service"},
	}
}

// Find returns the tool called name.
func Find(name string) (Tool, bool) {
	tools := Tools()
	i := slices.IndexFunc(tools, func(t Tool) bool { return t.Name == name })
	if i < 0 {
		return Tool{}, false
	}
	return tools[i], true
}

// Run runs a tool and returns the exit status. Where its service isn't there,
// help and version work, anything else is an error on one line.
func (t Tool) Run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 && (args[0] == "--version" || args[0] == "-v" && !t.longOnly) {
		WriteVersion(stdout, t.Name)
		return 0
	}
	if t.run != nil {
		return t.run(ctx, args, stdout, stderr)
	}
	if len(args) > 0 && (args[0] == "-h" || args[0] == "--help") {
		fmt.Fprint(stdout, t.usage())
		return 0
	}
	fmt.Fprintf(stderr, "%s: this release of krgimage doesn't have this service: %s\n", t.Name, t.Service)
	return 1
}

func (t Tool) usage() string {
	s := "Usage: " + t.Name
	if t.Synopsis != "" {
		s += " " + t.Synopsis
	}
	return s + "\n\n" + t.About + "\nThis release of krgimage doesn't have this service yet: " + t.Service + ".\n"
}

// WriteVersion writes the version block in the form of Kerrighed's tools: the
// program and its version, then where it comes from.
func WriteVersion(w io.Writer, name string) {
	fmt.Fprintf(w, "%s %s\nPart of krgimage, a single-system-image cluster with the commands of Kerrighed.\n", name, version.Version)
}
