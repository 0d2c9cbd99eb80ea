// Package krgadm is Kerrighed's command for the cluster's nodes: who is in the
// cluster, who may come in, who has to leave, and the end of all of it.
//
// Grammar, messages, and exit codes are Kerrighed's, since scripts read them;
// where the original was plainly broken, this does what it meant to do
// (docs/compatibility.md lists each case). --json and --timeout are new.
//
// krgadm decides nothing itself: it asks the node daemon through a Cluster.
package krgadm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/node/api"
)

// Cluster is what krgadm needs of the node daemon: api.Client.
type Cluster interface {
	Status(ctx context.Context) (api.Status, error)
	Add(ctx context.Context, ids []int) error
	Del(ctx context.Context, ids []int) error
	Poweroff(ctx context.Context) error
	Reboot(ctx context.Context) error
}

// Program is krgadm with what it works on.
type Program struct {
	Cluster Cluster
	Out     io.Writer
	Err     io.Writer
	// Wait passes the time between two looks at the cluster; it fails when ctx ends.
	Wait func(ctx context.Context, d time.Duration) error
}

// pollInterval is the time between two looks at the cluster while nodes are
// awaited, Kerrighed's one second.
const pollInterval = time.Second

// Exit codes.
const (
	exitDone        = 0
	exitFailed      = 1
	exitInterrupted = 130 // as a shell reports an interrupted command
)

// failure is an error whose message is out already.
type failure int

func (f failure) Error() string { return fmt.Sprintf("exit code %d", int(f)) }

// misuse is an error in the arguments: it ends with the usage.
type misuse string

func (m misuse) Error() string { return string(m) }

// Run carries out the arguments (without the program's name) and returns the
// exit code.
func (p Program) Run(ctx context.Context, args []string) int {
	err := p.run(ctx, args)
	var exit failure
	var wrong misuse
	var input inputError
	switch {
	case err == nil:
		return exitDone
	case ctx.Err() != nil:
		return exitInterrupted
	case errors.As(err, &exit):
		return int(exit)
	case errors.As(err, &input):
		io.WriteString(p.Err, string(input))
	case errors.As(err, &wrong):
		fmt.Fprintf(p.Err, "krgadm: %s\n%s", wrong, usage)
	default:
		fmt.Fprintf(p.Err, "krgadm: %v\n", err)
	}
	return exitFailed
}

func (p Program) run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		_, err := io.WriteString(p.Out, usage+hint)
		return err
	}
	switch args[0] {
	case "-h", "--help":
		_, err := io.WriteString(p.Out, usage+help)
		return err
	case "cluster":
		return p.cluster(ctx, args[1:])
	case "nodes":
		return p.nodes(ctx, args[1:])
	}
	return misuse(fmt.Sprintf("there is no mode %q", args[0]))
}

// actionOf splits the action off: no argument, or an option where the action
// would be, means status.
func actionOf(args []string) (action string, rest []string) {
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		return "status", args
	}
	return args[0], args[1:]
}

func (p Program) cluster(ctx context.Context, args []string) error {
	action, rest := actionOf(args)
	o, err := parse(rest)
	switch {
	case err != nil:
		return err
	case o.help:
		_, err := io.WriteString(p.Out, usage+help)
		return err
	case o.selector != byNothing || o.timeout != 0:
		return misuse("'krgadm cluster' takes no option but --json")
	}
	switch action {
	case "status":
		return p.clusterStatus(ctx, o)
	case "poweroff":
		return p.clusterEnd(ctx, o, "Shutting down cluster... ", p.Cluster.Poweroff)
	case "reboot":
		return p.clusterEnd(ctx, o, "Rebooting cluster... ", p.Cluster.Reboot)
	}
	return misuse(fmt.Sprintf("'krgadm cluster' has no action %q", action))
}

func (p Program) clusterStatus(ctx context.Context, o options) error {
	status, err := p.Cluster.Status(ctx)
	switch {
	case err != nil && !notRunning(err) && !o.json:
		io.WriteString(p.Out, "status: error\n")
		return err
	case err != nil:
		return p.failed(o, p.Err, err, "Kerrighed is not running: %s\n")
	case o.json:
		return p.print(status)
	}
	p.noteAge(status)
	if n := len(online(status)); status.Running && n > 0 {
		fmt.Fprintf(p.Out, "status: up on %d nodes\n", n)
	} else {
		io.WriteString(p.Out, "status: down\n")
	}
	return nil
}

// clusterEnd powers the cluster off or reboots it.
func (p Program) clusterEnd(ctx context.Context, o options, announce string, end func(context.Context) error) error {
	status, err := p.Cluster.Status(ctx)
	if err != nil {
		return p.failed(o, p.Err, err, "Kerrighed is not running: %s\n")
	}
	p.progress(o, announce)
	if !status.Running {
		p.progress(o, "fail (cluster not running)\n")
		if o.json {
			p.print(result{Error: "cluster not running"})
		}
		return failure(exitFailed)
	}
	if err := end(ctx); err != nil {
		return p.failed(o, p.Out, err, "fail (%s)\n")
	}
	p.progress(o, "done\n")
	if o.json {
		return p.print(result{Done: true})
	}
	return nil
}

// progress writes one of Kerrighed's messages unless JSON was asked for.
func (p Program) progress(o options, text string) {
	if !o.json {
		io.WriteString(p.Out, text)
	}
}

// failed reports an error in Kerrighed's form (a format with one %s for the
// error number's text), then what the number doesn't say.
func (p Program) failed(o options, to io.Writer, err error, format string) error {
	switch {
	case o.json:
		p.print(result{Error: err.Error(), Errno: api.AsError(err).Errno})
	case errors.Is(err, context.Canceled):
		io.WriteString(p.Out, "\n") // of the unfinished line
		return err
	default:
		fmt.Fprintf(to, format, strerror(err))
		if text := err.Error(); !strings.EqualFold(text, strerror(err)) {
			fmt.Fprintf(p.Err, "krgadm: %s\n", text)
		}
	}
	return failure(exitFailed)
}

// noteAge says that a status isn't of now: the head node is away.
func (p Program) noteAge(s api.Status) {
	if !s.Connected {
		fmt.Fprintf(p.Err, "krgadm: the head node does not answer; this is the state of %s\n", s.AsOf.Format(time.RFC3339))
	}
}

// result is what changes print with --json.
type result struct {
	Done    bool      `json:"done"`
	Nodes   []int     `json:"nodes,omitempty"`   // added or removed
	Skipped []skipped `json:"skipped,omitempty"` // named, but left alone
	Error   string    `json:"error,omitempty"`
	Errno   string    `json:"errno,omitempty"` // name of the error number
}

type skipped struct {
	ID     int    `json:"id"`
	Reason string `json:"reason"`
}

func (p Program) print(v any) error {
	e := json.NewEncoder(p.Out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// notRunning tells that there is no node daemon from one that fails.
func notRunning(err error) bool { return errors.Is(err, unix.ENOSYS) }

// strerror is the C library's text for the error number of err: Go's texts are
// the same but for the first letter.
func strerror(err error) string {
	text := api.AsError(err).Number().Error()
	return strings.ToUpper(text[:1]) + text[1:]
}
