package krgadm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"krgimage/node/api"
)

func (p Program) nodes(ctx context.Context, args []string) error {
	action, rest := actionOf(args)
	switch action {
	case "status", "add", "del":
	default:
		return misuse(fmt.Sprintf("'krgadm nodes' has no action %q", action))
	}
	o, err := parse(rest)
	switch {
	case err != nil:
		return err
	case o.help:
		_, err := io.WriteString(p.Out, usage+help)
		return err
	case action == "status" && (o.selector == byCount || o.selector == byTotal):
		return misuse("'krgadm nodes status' takes -n only")
	case action != "status" && o.selector == byNothing:
		return misuse(fmt.Sprintf("'krgadm nodes %s' wants one of -n, -c, -t, -a", action))
	case action != "add" && o.timeout != 0:
		return misuse("--timeout is for 'krgadm nodes add'")
	}
	status, err := p.Cluster.Status(ctx)
	if err != nil {
		return p.failed(o, p.Err, err, "Kerrighed is not running: %s\n")
	}
	o.list = slices.DeleteFunc(o.list, func(id int) bool { return id >= status.MaxNodes })
	switch action {
	case "add":
		return p.add(ctx, o, status)
	case "del":
		return p.del(ctx, o, status)
	}
	return p.nodesStatus(o, status)
}

// nodesStatus prints ID:STATE of each node, ascending. Nodes of the list that
// are neither present nor online have no line.
func (p Program) nodesStatus(o options, status api.Status) error {
	list := status.Nodes
	if o.selector == byList {
		list = slices.DeleteFunc(slices.Clone(list), func(n api.Node) bool { return !slices.Contains(o.list, n.ID) })
	}
	if o.json {
		return p.print(append([]api.Node{}, list...))
	}
	p.noteAge(status)
	for _, n := range list {
		fmt.Fprintf(p.Out, "%d:%s\n", n.ID, n.State)
	}
	return nil
}

func (p Program) add(ctx context.Context, o options, status api.Status) error {
	var ids []int
	var err error
	wait, stop := ctx, context.CancelFunc(func() {})
	if o.timeout > 0 {
		wait, stop = context.WithTimeoutCause(ctx, o.timeout, unix.ETIMEDOUT)
	}
	switch o.selector {
	case byAll:
		ids = present(status)
	case byList:
		ids, err = p.waitForList(wait, o, status)
	case byTotal:
		ids, err = p.waitForCount(wait, o, status, o.number-len(online(status)))
	case byCount:
		ids, err = p.waitForCount(wait, o, status, o.number)
	}
	stop()
	if err != nil {
		return err
	}
	if len(ids) == 0 {
		p.progress(o, "No present node to add.\n")
		if o.json {
			return p.print(result{Done: true})
		}
		return nil
	}
	p.progress(o, "Adding nodes "+setString(ids)+"... ")
	if err := p.Cluster.Add(ctx, ids); err != nil {
		return p.failed(o, p.Err, err, "fail: %s\n")
	}
	p.progress(o, "done\n")
	if o.json {
		return p.print(result{Done: true, Nodes: ids})
	}
	return nil
}

// waitFailed ends the line that a wait began.
const waitFailed = " fail (%s)\n"

// waitForList waits until each listed node that isn't online is present, and
// returns those to add. Kerrighed waited for ever for a node that somebody else
// had added meanwhile; here it counts as there.
func (p Program) waitForList(ctx context.Context, o options, status api.Status) ([]int, error) {
	in := online(status)
	wanted := slices.DeleteFunc(slices.Clone(o.list), func(id int) bool { return slices.Contains(in, id) })
	if len(wanted) == 0 {
		return nil, nil
	}
	p.progress(o, "Waiting for nodes to join... ")
	for {
		isPresent, isOnline := present(status), online(status)
		all := true
		for _, id := range wanted {
			there := slices.Contains(isPresent, id) || slices.Contains(isOnline, id)
			all = all && there
			p.progress(o, fmt.Sprintf("%4d:%d", id, oneIf(there)))
		}
		if all {
			p.progress(o, " done\n")
			return slices.DeleteFunc(wanted, func(id int) bool { return slices.Contains(isOnline, id) }), nil
		}
		var err error
		if status, err = p.again(ctx, o, 6*len(wanted)); err != nil {
			return nil, err
		}
	}
}

// waitForCount waits until n nodes are present and returns the lowest n of
// them. Nodes that somebody else adds meanwhile count.
func (p Program) waitForCount(ctx context.Context, o options, status api.Status, n int) ([]int, error) {
	if n <= 0 {
		return nil, nil
	}
	p.progress(o, fmt.Sprintf("Waiting for %d nodes to join... ", n))
	if n > status.MaxNodes {
		return nil, p.failed(o, p.Out, unix.ERANGE, waitFailed)
	}
	before := online(status)
	for {
		isPresent := present(status)
		joined := 0
		for _, id := range online(status) {
			joined += oneIf(!slices.Contains(before, id))
		}
		p.progress(o, fmt.Sprintf("%4d/%-4d", len(isPresent)+joined, n))
		if len(isPresent)+joined >= n {
			p.progress(o, " done\n")
			return isPresent[:max(0, n-joined)], nil
		}
		var err error
		if status, err = p.again(ctx, o, 9); err != nil {
			return nil, err
		}
	}
}

// again waits a moment, erases the last figures, and looks at the cluster anew.
// A node daemon that is being started again is waited for as well.
func (p Program) again(ctx context.Context, o options, figures int) (api.Status, error) {
	for {
		if err := p.Wait(ctx, pollInterval); err != nil {
			if cause := context.Cause(ctx); errors.Is(cause, unix.ETIMEDOUT) {
				err = cause
			}
			return api.Status{}, p.failed(o, p.Out, err, waitFailed)
		}
		status, err := p.Cluster.Status(ctx)
		if err == nil {
			p.progress(o, strings.Repeat("\b", figures))
			return status, nil
		}
		if !notRunning(err) && ctx.Err() == nil {
			return api.Status{}, p.failed(o, p.Out, err, waitFailed)
		}
	}
}

func (p Program) del(ctx context.Context, o options, status api.Status) error {
	in := online(status)
	others := slices.DeleteFunc(slices.Clone(in), func(id int) bool { return id == status.NodeID })
	var ids []int
	var left []skipped
	skip := func(id int, text string) {
		p.progress(o, text+"\n")
		left = append(left, skipped{id, text})
	}
	switch o.selector {
	case byAll:
		ids = others
	case byList:
		for _, id := range o.list {
			switch {
			case !slices.Contains(in, id):
				skip(id, fmt.Sprintf("Unable to suppress node %d (must be 'online').", id))
			case id == status.NodeID:
				skip(id, "Unable to suppress current node.")
			default:
				ids = append(ids, id)
			}
		}
	default:
		n := o.number
		if o.selector == byTotal {
			n = len(in) - o.number
		}
		if n >= len(in) {
			p.progress(o, "Not enough nodes to remove. Aborting.\n")
			if o.json {
				p.print(result{Error: "not enough nodes to remove"})
			}
			return failure(exitFailed)
		}
		ids = others[:min(max(n, 0), len(others))]
	}
	if len(ids) == 0 {
		p.progress(o, "No online node to remove.\n")
		if o.json {
			return p.print(result{Done: true, Skipped: left})
		}
		return nil
	}
	p.progress(o, "Removing nodes "+setString(ids)+"... ")
	if err := p.Cluster.Del(ctx, ids); err != nil {
		return p.failed(o, p.Err, err, "fail: %s\n")
	}
	p.progress(o, "done\n")
	if o.json {
		return p.print(result{Done: true, Nodes: ids, Skipped: left})
	}
	return nil
}

func present(s api.Status) []int { return inState(s, api.Present) }
func online(s api.Status) []int  { return inState(s, api.Online) }

// inState lists the ids of the nodes in exactly this state, ascending.
func inState(s api.Status, state api.State) []int {
	ids := map[int]bool{}
	for _, n := range s.Nodes {
		if n.State == state {
			ids[n.ID] = true
		}
	}
	return ascending(ids)
}

func ascending(ids map[int]bool) []int { return slices.Sorted(maps.Keys(ids)) }

func oneIf(b bool) int {
	if b {
		return 1
	}
	return 0
}

// setString is Kerrighed's form of a set: [1,2,5].
func setString(ids []int) string {
	text := make([]string, len(ids))
	for i, id := range ids {
		text[i] = fmt.Sprint(id)
	}
	return "[" + strings.Join(text, ",") + "]"
}
