package krgadm

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/node/api"
)

var update = flag.Bool("update", false, "write the golden files")

// fakeCluster is a cluster of nodes whose state a test gives as text, "1o2p":
// node 1 online, node 2 present. Each look at it takes the next text; the last
// one stays.
type fakeCluster struct {
	looks []string
	self  int
	away  bool
	err   error // of Status
	fail  error // of changes
	calls []string
}

func (f *fakeCluster) Status(context.Context) (api.Status, error) {
	s := api.Status{SessionID: 1, NodeID: f.self, MaxNodes: 256, Connected: !f.away, AsOf: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	if f.err != nil {
		return s, f.err
	}
	text := f.looks[0]
	if len(f.looks) > 1 {
		f.looks = f.looks[1:]
	}
	for text != "" {
		var id int
		var c rune
		if _, err := fmt.Sscanf(text, "%d%c", &id, &c); err != nil {
			return s, err
		}
		state := api.Present
		if c == 'o' {
			state, s.Running = api.Online, true
		}
		s.Nodes = append(s.Nodes, api.Node{ID: id, State: state, Hostname: fmt.Sprintf("krg-%d", id), Address: fmt.Sprintf("10.77.0.%d", id), Since: s.AsOf})
		text = text[len(fmt.Sprint(id))+1:]
	}
	return s, nil
}

func (f *fakeCluster) do(name string, ids ...int) error {
	f.calls = append(f.calls, strings.TrimSuffix(fmt.Sprint(name, ids), "[]"))
	return f.fail
}

func (f *fakeCluster) Add(_ context.Context, ids []int) error { return f.do("add", ids...) }
func (f *fakeCluster) Del(_ context.Context, ids []int) error { return f.do("del", ids...) }
func (f *fakeCluster) Poweroff(context.Context) error         { return f.do("poweroff") }
func (f *fakeCluster) Reboot(context.Context) error           { return f.do("reboot") }

// run calls krgadm on a cluster and returns all that came of it.
func (f *fakeCluster) run(line string) (out, errOut string, code int) {
	var o, e bytes.Buffer
	p := Program{Cluster: f, Out: &o, Err: &e, Wait: func(ctx context.Context, _ time.Duration) error { return ctx.Err() }}
	args := strings.Fields(line)
	for i, a := range args {
		args[i] = strings.ReplaceAll(a, "_", " ")
	}
	code = p.Run(context.Background(), args)
	return o.String(), e.String(), code
}

// gone is what the client says when there is no node daemon.
var gone = api.Errorf(unix.ENOSYS, "the node daemon doesn't run on this machine")

const exclusive = "Only one of --all, --count, --total or --nodes option is\nsupported. Aborting.\n"

// TestMessages holds every message and exit code against the reference. A
// message that ends in "usage" stands for that message and the usage text.
func TestMessages(t *testing.T) {
	for _, tc := range []struct {
		line  string
		c     fakeCluster
		out   string
		err   string
		code  int
		calls string
	}{
		// cluster
		{line: "cluster", c: fakeCluster{looks: []string{"1o2o3p"}}, out: "status: up on 2 nodes\n"},
		{line: "cluster status", c: fakeCluster{looks: []string{"1o"}}, out: "status: up on 1 nodes\n"},
		{line: "cluster status", c: fakeCluster{looks: []string{"1p2p"}}, out: "status: down\n"},
		{line: "cluster", c: fakeCluster{err: errors.New("broken")}, out: "status: error\n", err: "krgadm: broken\n", code: 1},
		{line: "cluster", c: fakeCluster{err: gone}, err: "Kerrighed is not running: Function not implemented\nkrgadm: the node daemon doesn't run on this machine\n", code: 1},
		{line: "cluster", c: fakeCluster{looks: []string{"1o"}, away: true}, out: "status: up on 1 nodes\n",
			err: "krgadm: the head node does not answer; this is the state of 2026-01-02T03:04:05Z\n"},
		{line: "cluster start", err: `krgadm: 'krgadm cluster' has no action "start"` + "\nusage", code: 1},
		{line: "cluster status now", err: `krgadm: unexpected argument "now"` + "\nusage", code: 1},
		{line: "cluster poweroff", c: fakeCluster{looks: []string{"1o"}}, out: "Shutting down cluster... done\n", calls: "poweroff"},
		{line: "cluster reboot", c: fakeCluster{looks: []string{"1o"}}, out: "Rebooting cluster... done\n", calls: "reboot"},
		{line: "cluster poweroff", c: fakeCluster{looks: []string{"1p"}}, out: "Shutting down cluster... fail (cluster not running)\n", code: 1},
		{line: "cluster reboot", c: fakeCluster{looks: []string{"1p"}}, out: "Rebooting cluster... fail (cluster not running)\n", code: 1},
		{line: "cluster poweroff", c: fakeCluster{looks: []string{"1o"}, fail: unix.EPERM}, out: "Shutting down cluster... fail (Operation not permitted)\n", code: 1, calls: "poweroff"},

		// nodes status
		{line: "nodes", c: fakeCluster{looks: []string{"1o2p10o"}}, out: "1:online\n2:present\n10:online\n"},
		{line: "nodes status", c: fakeCluster{looks: []string{""}}},
		{line: "nodes status -n 2-3,200,10", c: fakeCluster{looks: []string{"1o2p10o"}}, out: "2:present\n10:online\n"},
		{line: "nodes -n 2", c: fakeCluster{looks: []string{"1o2p"}}, out: "2:present\n"},
		{line: "nodes status -a", c: fakeCluster{looks: []string{"1o2p"}}, out: "1:online\n2:present\n"},
		{line: "nodes status -n 300,5-2", c: fakeCluster{looks: []string{"1o2p"}}},
		{line: "nodes status -c 2", err: "krgadm: 'krgadm nodes status' takes -n only\nusage", code: 1},
		{line: "nodes status -t 2", err: "krgadm: 'krgadm nodes status' takes -n only\nusage", code: 1},
		{line: "nodes", c: fakeCluster{err: gone}, err: "Kerrighed is not running: Function not implemented\nkrgadm: the node daemon doesn't run on this machine\n", code: 1},
		{line: "nodes fly", err: `krgadm: 'krgadm nodes' has no action "fly"` + "\nusage", code: 1},

		// selectors
		{line: "nodes add", err: "krgadm: 'krgadm nodes add' wants one of -n, -c, -t, -a\nusage", code: 1},
		{line: "nodes del", err: "krgadm: 'krgadm nodes del' wants one of -n, -c, -t, -a\nusage", code: 1},
		{line: "nodes add -a -n 2", err: exclusive, code: 1},
		{line: "nodes add --count 1 --total=2", err: exclusive, code: 1},
		{line: "nodes del -a -a", err: exclusive, code: 1},
		{line: "nodes add -n a", err: "node: Invalid argument\n", code: 1},
		{line: "nodes add -n 2,,3", err: "node: Invalid argument\n", code: 1},
		{line: "nodes add -n 2,x-3", err: "first node range: Invalid argument\n", code: 1},
		{line: "nodes add -n -3", err: "first node range: Invalid argument\n", code: 1},
		{line: "nodes add -n 3-", err: "end node range: Invalid argument\n", code: 1},
		{line: "nodes add -n 3-4-5", err: "end node range: Invalid argument\n", code: 1},
		{line: "nodes add -c two", err: "nodes number: Invalid argument\n", code: 1},
		{line: "nodes add -t 3x", err: "nodes number: Invalid argument\n", code: 1},
		{line: "nodes add -n 2 3", err: `krgadm: unexpected argument "3"` + "\nusage", code: 1},
		{line: "nodes add -n", err: "krgadm: -n wants a value\nusage", code: 1},
		{line: "nodes add -x", err: `krgadm: unknown option "-x"` + "\nusage", code: 1},
		{line: "nodes del -a --timeout 3", err: "krgadm: --timeout is for 'krgadm nodes add'\nusage", code: 1},
		{line: "nodes add -a --timeout soon", err: `krgadm: --timeout "soon": want seconds, or a time such as 2m30s` + "\nusage", code: 1},

		// nodes add
		{line: "nodes add -a", c: fakeCluster{looks: []string{"1o2p5p3o"}}, out: "Adding nodes [2,5]... done\n", calls: "add[2 5]"},
		{line: "nodes add --all", c: fakeCluster{looks: []string{"1o"}}, out: "No present node to add.\n"},
		{line: "nodes add -a", c: fakeCluster{looks: []string{"1o2p"}, fail: unix.EAGAIN}, out: "Adding nodes [2]... ", err: "fail: Resource temporarily unavailable\n", code: 1, calls: "add[2]"},
		{line: "nodes add -a", c: fakeCluster{looks: []string{"1o2p"}, fail: fmt.Errorf("node 2: sshd did not start: %w", unix.EAGAIN)}, out: "Adding nodes [2]... ",
			err: "fail: Resource temporarily unavailable\nkrgadm: node 2: sshd did not start: resource temporarily unavailable\n", code: 1, calls: "add[2]"},
		{line: "nodes add -n 2,1", c: fakeCluster{looks: []string{"1o2p"}}, out: "Waiting for nodes to join...    2:1 done\nAdding nodes [2]... done\n", calls: "add[2]"},
		{line: "nodes add -n1", c: fakeCluster{looks: []string{"1o2p"}}, out: "No present node to add.\n"},
		{line: "nodes add -n 3,2", c: fakeCluster{looks: []string{"1o2p", "1o2p3p"}},
			out: "Waiting for nodes to join...    2:1   3:0" + strings.Repeat("\b", 12) + "   2:1   3:1 done\nAdding nodes [2,3]... done\n", calls: "add[2 3]"},
		{line: "nodes add -n 3", c: fakeCluster{looks: []string{"1o", "1o3o"}},
			out: "Waiting for nodes to join...    3:0" + strings.Repeat("\b", 6) + "   3:1 done\nNo present node to add.\n"},
		{line: "nodes add -n 3 --timeout 1ns", c: fakeCluster{looks: []string{"1o"}}, out: "Waiting for nodes to join...    3:0 fail (Connection timed out)\n", code: 1},
		{line: "nodes add -c 2", c: fakeCluster{looks: []string{"1o", "1o4p", "1o4p3p9p"}},
			out: "Waiting for 2 nodes to join...    0/2   " + strings.Repeat("\b", 9) + "   1/2   " + strings.Repeat("\b", 9) + "   3/2    done\nAdding nodes [3,4]... done\n", calls: "add[3 4]"},
		{line: "nodes add -c 0", c: fakeCluster{looks: []string{"1o2p"}}, out: "No present node to add.\n"},
		{line: "nodes add -c -1", c: fakeCluster{looks: []string{"1o2p"}}, out: "No present node to add.\n"},
		{line: "nodes add -c 257", c: fakeCluster{looks: []string{"1o2p"}}, out: "Waiting for 257 nodes to join...  fail (Numerical result out of range)\n", code: 1},
		{line: "nodes add -t 3", c: fakeCluster{looks: []string{"1o2p", "1o2p3p"}},
			out: "Waiting for 2 nodes to join...    1/2   " + strings.Repeat("\b", 9) + "   2/2    done\nAdding nodes [2,3]... done\n", calls: "add[2 3]"},
		{line: "nodes add --total 3", c: fakeCluster{looks: []string{"1o2p", "1o2o3p"}},
			out: "Waiting for 2 nodes to join...    1/2   " + strings.Repeat("\b", 9) + "   2/2    done\nAdding nodes [3]... done\n", calls: "add[3]"},
		{line: "nodes add --to 1", c: fakeCluster{looks: []string{"1o2p"}}, out: "No present node to add.\n"},
		{line: "nodes add --t 1", c: fakeCluster{looks: []string{"1o2p"}}, out: "No present node to add.\n"},

		// nodes del
		{line: "nodes del -a", c: fakeCluster{looks: []string{"1o2o3o4p"}, self: 2}, out: "Removing nodes [1,3]... done\n", calls: "del[1 3]"},
		{line: "nodes del -a", c: fakeCluster{looks: []string{"1o4p"}, self: 1}, out: "No online node to remove.\n"},
		{line: "nodes del -n 4,1-2", c: fakeCluster{looks: []string{"1o2o4p"}, self: 1},
			out: "Unable to suppress current node.\nUnable to suppress node 4 (must be 'online').\nRemoving nodes [2]... done\n", calls: "del[2]"},
		{line: "nodes del -n 4", c: fakeCluster{looks: []string{"1o"}, self: 1}, out: "Unable to suppress node 4 (must be 'online').\nNo online node to remove.\n"},
		{line: "nodes del -c 2", c: fakeCluster{looks: []string{"1o2o3o4o"}, self: 1}, out: "Removing nodes [2,3]... done\n", calls: "del[2 3]"},
		{line: "nodes del -c 2", c: fakeCluster{looks: []string{"1o2o"}, self: 1}, out: "Not enough nodes to remove. Aborting.\n", code: 1},
		{line: "nodes del -c 0", c: fakeCluster{looks: []string{"1o2o"}, self: 1}, out: "No online node to remove.\n"},
		{line: "nodes del -t 1", c: fakeCluster{looks: []string{"1o2o3o"}, self: 2}, out: "Removing nodes [1,3]... done\n", calls: "del[1 3]"},
		{line: "nodes del -t 0", c: fakeCluster{looks: []string{"1o2o3o"}, self: 2}, out: "Not enough nodes to remove. Aborting.\n", code: 1},
		{line: "nodes del -t 7", c: fakeCluster{looks: []string{"1o2o3o"}, self: 2}, out: "No online node to remove.\n"},
		{line: "nodes del -a", c: fakeCluster{looks: []string{"1o2o"}, self: 1, fail: unix.EPERM}, out: "Removing nodes [2]... ", err: "fail: Operation not permitted\n", code: 1, calls: "del[2]"},

		{line: "fly", err: `krgadm: there is no mode "fly"` + "\nusage", code: 1},
		{line: "-v", err: `krgadm: there is no mode "-v"` + "\nusage", code: 1},
	} {
		out, errOut, code := tc.c.run(tc.line)
		want := tc.err
		if rest, ok := strings.CutSuffix(want, "usage"); ok {
			want = rest + usage
		}
		if out != tc.out || errOut != want || code != tc.code {
			t.Errorf("krgadm %s:\nstdout %q\n  want %q\nstderr %q\n  want %q\nexit %d, want %d", tc.line, out, tc.out, errOut, want, code, tc.code)
		}
		if got := strings.Join(tc.c.calls, " "); got != tc.calls {
			t.Errorf("krgadm %s asked for %q, want %q", tc.line, got, tc.calls)
		}
	}
}

// TestGolden holds the long texts and JSON outputs against files.
func TestGolden(t *testing.T) {
	three := func() *fakeCluster { return &fakeCluster{looks: []string{"1o2o3p"}, self: 1} }
	var b strings.Builder
	for _, tc := range []struct {
		line string
		c    *fakeCluster
	}{
		{"", three()}, {"--help", three()}, {"nodes --json", three()}, {"cluster --json", three()}, {"nodes status -n 3 --json", three()},
		{"nodes --json", &fakeCluster{looks: []string{""}}},
		{"nodes add -a --json", three()}, {"nodes add -n 2 --json", three()}, {"nodes del -n 1,2,9 -j", three()}, {"nodes del -c 9 --json", three()},
		{"cluster poweroff --json", three()},
		{"cluster reboot --json", &fakeCluster{looks: []string{"1p"}}},
		{"nodes add -a --json", &fakeCluster{looks: []string{"1o2p"}, fail: fmt.Errorf("node 2: no answer: %w", unix.EAGAIN)}},
		{"nodes add -n 2 -T 1ns --json", &fakeCluster{looks: []string{"1o"}}},
		{"nodes --json", &fakeCluster{err: gone}},
	} {
		out, errOut, code := tc.c.run(tc.line)
		fmt.Fprintf(&b, "$ krgadm %s\n%s", tc.line, out)
		if errOut != "" {
			fmt.Fprintf(&b, "[stderr]\n%s", errOut)
		}
		fmt.Fprintf(&b, "[exit %d]\n", code)
	}
	file := filepath.Join("testdata", "golden.txt")
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(file, []byte(b.String()), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got := b.String(); got != string(want) {
		t.Errorf("the output changed (go test -update writes %s):\n%s", file, got)
	}
}

func TestInterrupt(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	var out, errOut bytes.Buffer
	p := Program{Cluster: &fakeCluster{looks: []string{"1o"}}, Out: &out, Err: &errOut,
		Wait: func(ctx context.Context, _ time.Duration) error { cancel(); return ctx.Err() }}
	if code := p.Run(ctx, []string{"nodes", "add", "-c", "1"}); code != 130 {
		t.Errorf("exit %d", code)
	}
	if want := "Waiting for 1 nodes to join...    0/1   \n"; out.String() != want || errOut.Len() > 0 {
		t.Errorf("stdout %q, want %q; stderr %q", out.String(), want, errOut.String())
	}
}

func FuzzParseList(f *testing.F) {
	for _, s := range []string{"2,3,6-10,42-45", "5-2", "3-", "a", "", " 1", "+1", "0-999999999999999999999", "1,,2", "-1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ids, err := parseList(s)
		if err != nil {
			if text := err.Error(); !strings.HasSuffix(text, ": Invalid argument\n") {
				t.Errorf("%q: %q", s, text)
			}
			return
		}
		if !slices.IsSorted(ids) || len(ids) > maxID+1 || len(ids) > 0 && (ids[0] < 0 || ids[len(ids)-1] > maxID) {
			t.Errorf("%q: %v", s, ids)
		}
	})
}
