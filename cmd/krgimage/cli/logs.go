package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"krgimage/configs"
	"krgimage/pxe/head"
	"krgimage/services/logs"
)

// logsDir is where the head of a state directory keeps the nodes' records.
func logsDir(state string) string { return filepath.Join(state, "head", "logs") }

func (a *app) logsCommand() *cobra.Command {
	var follow, asJSON bool
	var since, level string
	var last int
	cmd := &cobra.Command{
		Use:   "logs [flags] [node...]",
		Short: "Show what the nodes have logged",
		Long: `Show the log records that the head node has of the nodes (ids or host names;
without one, of all): those of the node daemon (krgd), of the node's init and of
the container's services, and the kernel's warnings and errors. They are kept in
the state directory, 64 MB at most, so they can be read when the node or the head
is gone.

A node that logs too much at once is cut short; the records say how many were
lost. What happened before a node had joined is on its console.`,
		Example: `  krgimage logs
  krgimage logs 2 -f
  krgimage logs --since 10m --level warn
  krgimage logs --json krg-3 | jq -r .message`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.load()
			if err != nil {
				return err
			}
			state, err := a.state()
			if err != nil {
				return err
			}
			f := logs.Filter{Last: last}
			if err := f.Level.UnmarshalText([]byte(level)); err != nil {
				return usageError{fmt.Errorf("--level %q: want debug, info, warn or error", level)}
			}
			if f.Since, err = parseSince(since, time.Now()); err != nil {
				return err
			}
			for _, arg := range args {
				id, err := nodeID(c, arg)
				if err != nil {
					return err
				}
				f.Nodes = append(f.Nodes, id)
			}
			return a.printLogs(cmd, state, f, follow, asJSON)
		},
	}
	flags := cmd.Flags()
	flags.BoolVarP(&follow, "follow", "f", false, "go on with what comes")
	flags.BoolVar(&asJSON, "json", false, "print JSON, an object a line")
	flags.StringVar(&since, "since", "", "only records since a `time`: 10m, 2h, 15:04, 2006-01-02 or 2006-01-02T15:04:05Z")
	flags.StringVar(&level, "level", "info", "only records of this `level` and worse: debug, info, warn, error")
	flags.IntVarP(&last, "lines", "n", 0, "only the last `N` records")
	return cmd
}

func (a *app) printLogs(cmd *cobra.Command, state string, f logs.Filter, follow, asJSON bool) error {
	// The head that runs, or else the one that wrote last.
	dir := logsDir(state)
	if client, err := head.Dial(cmd.Context(), state); err == nil {
		client.Close()
	} else if client, err := head.Dial(cmd.Context(), trialDir(state)); err == nil {
		client.Close()
		dir = logsDir(trialDir(state))
	} else if newer(logsDir(trialDir(state)), dir) {
		dir = logsDir(trialDir(state))
	}
	out := json.NewEncoder(a.Out)
	for r, err := range logs.Read(cmd.Context(), dir, f, follow) {
		if err != nil {
			return err
		}
		if asJSON {
			err = out.Encode(r)
		} else {
			_, err = fmt.Fprintln(a.Out, r.Text())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// newer reports whether the newest file of one directory is newer than the
// other's.
func newer(dir, than string) bool {
	modified := func(dir string) (last time.Time) {
		files, _ := filepath.Glob(filepath.Join(dir, "*.jsonl"))
		for _, f := range files {
			if info, err := os.Stat(f); err == nil && info.ModTime().After(last) {
				last = info.ModTime()
			}
		}
		return last
	}
	return modified(dir).After(modified(than))
}

// nodeID is the node that a person means: an id or a host name.
func nodeID(c configs.Cluster, name string) (int, error) {
	if id, err := strconv.Atoi(name); err == nil {
		if id < 0 || id > 255 {
			return 0, usageError{fmt.Errorf("node %d: node ids are 0 to 255", id)}
		}
		return id, nil
	}
	for _, n := range c.Nodes.Table {
		if n.Hostname == name {
			return n.ID, nil
		}
	}
	for _, id := range c.DiscoverIDs() {
		if c.Hostname(id) == name {
			return id, nil
		}
	}
	return 0, usageError{fmt.Errorf("there is no node called %q in %s", name, c.Name)}
}

// parseSince reads a time or how long ago it was; nothing is the zero time.
func parseSince(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(strings.TrimSuffix(text, " ago")); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, form := range []string{time.RFC3339, "2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(form, text, now.Location()); err == nil {
			return t, nil
		}
	}
	for _, form := range []string{"15:04:05", "15:04"} {
		if t, err := time.Parse(form, text); err == nil {
			y, m, d := now.Date()
			return time.Date(y, m, d, t.Hour(), t.Minute(), t.Second(), 0, now.Location()), nil
		}
	}
	return time.Time{}, usageError{errors.New("--since " + strconv.Quote(text) + ": want a time such as 10m, 15:04 or 2006-01-02T15:04:05Z")}
}
