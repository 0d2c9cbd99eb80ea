package twonodes

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"krgimage/nfsroot/nfs"
	"krgimage/test/uml"
)

func TestMain(m *testing.M) {
	os.Exit(uml.Main(m, map[string]uml.Program{"actor": actorMain}))
}

// scenario is a change on one node and how the other looks for it. Paths begin
// with the directory of the round.
type scenario struct {
	name string
	prep [][]string // on the node that changes
	do   [][]string // likewise
	look []string   // on the other node, also before the change to fill its caches
	want string     // what it must see afterwards; "" for anything else than before
	// soon allows for a second: the name led to another file, which is still
	// there, under another name.
	soon bool
}

var scenarios = []scenario{
	{"create, stat", nil, [][]string{{"write", "/f", "new"}}, []string{"stat", "/f"}, "", false},
	{"create, open", nil, [][]string{{"write", "/f", "new"}}, []string{"read", "/f"}, "new", false},
	{"create, list", nil, [][]string{{"write", "/f", "new"}}, []string{"list", "/"}, "f", false},
	{"content, same size", [][]string{{"write", "/f", "old"}}, [][]string{{"write", "/f", "new"}}, []string{"read", "/f"}, "new", false},
	{"append, stat", [][]string{{"write", "/f", "old"}}, [][]string{{"append", "/f", "new"}}, []string{"stat", "/f"}, "", false},
	{"append, open", [][]string{{"write", "/f", "old"}}, [][]string{{"append", "/f", "new"}}, []string{"read", "/f"}, "oldnew", false},
	{"truncate, open", [][]string{{"write", "/f", "old"}}, [][]string{{"truncate", "/f"}}, []string{"read", "/f"}, "ol", false},
	{"rename over, open", [][]string{{"write", "/f", "old"}}, [][]string{{"write", "/g", "new"}, {"rename", "/g", "/f"}}, []string{"read", "/f"}, "new", false},
	{"rename over with a link, open", [][]string{{"write", "/f", "old"}, {"link", "/f", "/h"}}, [][]string{{"write", "/g", "new"}, {"rename", "/g", "/f"}}, []string{"read", "/f"}, "new", true},
	{"rename over, stat", [][]string{{"write", "/f", "old"}}, [][]string{{"write", "/g", "newer"}, {"rename", "/g", "/f"}}, []string{"stat", "/f"}, "", false},
	{"rename away, stat", [][]string{{"write", "/f", "old"}}, [][]string{{"rename", "/f", "/g"}}, []string{"stat", "/f"}, "no such file or directory", true},
	{"rename away, stat after statx of the directory", [][]string{{"write", "/f", "old"}}, [][]string{{"rename", "/f", "/g"}}, []string{"fresh stat", "/f"}, "no such file or directory", false},
	{"swap of two files, open", [][]string{{"write", "/f", "old"}, {"write", "/g", "new"}}, [][]string{{"rename", "/f", "/x"}, {"rename", "/g", "/f"}, {"rename", "/x", "/g"}}, []string{"read", "/f"}, "new", true},
	{"unlink, stat", [][]string{{"write", "/f", "old"}}, [][]string{{"unlink", "/f"}}, []string{"stat", "/f"}, "no such file or directory", false},
	{"unlink, open", [][]string{{"write", "/f", "old"}}, [][]string{{"unlink", "/f"}}, []string{"read", "/f"}, "no such file or directory", false},
	{"unlink, list", [][]string{{"write", "/f", "old"}, {"write", "/g", ""}}, [][]string{{"unlink", "/f"}}, []string{"list", "/"}, "g", false},
	{"unlink and create anew, open", [][]string{{"write", "/f", "old"}}, [][]string{{"unlink", "/f"}, {"write", "/f", "new"}}, []string{"read", "/f"}, "new", false},
	{"chmod, stat", [][]string{{"write", "/f", "old"}}, [][]string{{"chmod", "/f"}}, []string{"stat", "/f"}, "", false},
	{"chown, stat", [][]string{{"write", "/f", "old"}}, [][]string{{"chown", "/f"}}, []string{"stat", "/f"}, "", false},
	{"touch, stat", [][]string{{"write", "/f", "old"}}, [][]string{{"touch", "/f"}}, []string{"stat", "/f"}, "", false},
	{"link, stat", [][]string{{"write", "/f", "old"}}, [][]string{{"link", "/f", "/g"}}, []string{"stat", "/f"}, "", false},
	{"symlink replaced", [][]string{{"symlink", "old", "/f"}}, [][]string{{"symlink", "new", "/g"}, {"rename", "/g", "/f"}}, []string{"readlink", "/f"}, "new", false},
	{"directory made, file in it", nil, [][]string{{"mkdir", "/d"}, {"write", "/d/f", "new"}}, []string{"read", "/d/f"}, "new", false},
	{"directory renamed", [][]string{{"mkdir", "/d"}, {"write", "/d/f", "old"}}, [][]string{{"rename", "/d", "/e"}}, []string{"read", "/d/f"}, "no such file or directory", true},
	{"directory replaced", [][]string{{"mkdir", "/d"}, {"write", "/d/f", "old"}, {"mkdir", "/n"}, {"write", "/n/f", "new"}},
		[][]string{{"rename", "/d", "/o"}, {"rename", "/n", "/d"}}, []string{"read", "/d/f"}, "new", true},
	{"open file, written and synced, read", [][]string{{"write", "/f", "old"}, {"open", "/f"}}, [][]string{{"pwrite", "/f", "new"}, {"fsync", "/f"}}, []string{"read", "/f"}, "new", false},
	{"open file, written and sync(2), read", [][]string{{"write", "/f", "old"}, {"open", "/f"}}, [][]string{{"pwrite", "/f", "new"}, {"sync"}}, []string{"read", "/f"}, "new", false},
}

// pair is two nodes with an actor each.
type pair struct {
	a, b *actor
	n    int
}

const (
	mountDir = "/mnt/root"
	patience = 5 * time.Minute
)

func boot(t *testing.T, options ...string) (*uml.Net, []*uml.Guest) {
	t.Helper()
	uml.Need(t)
	n := uml.NewNet(t)
	n.Serve(t, nfs.Config{HandleKey: []byte("two nodes' handle key"), Exports: []nfs.Export{{Path: "/", Dir: t.TempDir()}}})
	guests := n.BootAll(t, "one", "two")
	for _, g := range guests {
		g.Mount(t, uml.Port, "/", mountDir, options...)
	}
	return n, guests
}

// round runs a scenario in a new directory, and tells how long it took until
// the second node saw the change, or what it saw instead. With once it looks
// once only.
func (p *pair) round(t *testing.T, sc scenario, warm time.Duration, once bool) (delay time.Duration, seen string) {
	t.Helper()
	p.n++
	dir := fmt.Sprintf("%s/r%d", mountDir, p.n)
	run := func(a *actor, command []string) string {
		args := []string{command[0]}
		for _, arg := range command[1:] {
			if strings.HasPrefix(arg, "/") {
				arg = strings.TrimSuffix(dir+arg, "/")
			}
			args = append(args, arg)
		}
		result, err := a.do(t.Context(), args...)
		if err != nil {
			t.Fatalf("%s: %v: %v", sc.name, command, err)
		}
		return result
	}
	must := func(a *actor, commands [][]string) {
		for _, c := range commands {
			if result := run(a, c); result != "" {
				t.Fatalf("%s: %v: %s", sc.name, c, result)
			}
		}
	}
	must(p.a, [][]string{{"mkdir", "/"}})
	must(p.a, sc.prep)
	before := run(p.b, sc.look)
	for end := time.Now().Add(warm); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		run(p.b, sc.look)
	}
	run(p.b, sc.look)
	must(p.a, sc.do)
	changed := time.Now()
	for {
		seen = run(p.b, sc.look)
		delay = time.Since(changed)
		if sc.want == "" && seen != before || sc.want != "" && seen == sc.want {
			return delay, ""
		}
		if once || delay > patience {
			return delay, seen
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestCoherence: what one node has done, the other sees with its next look, but
// for a few changes of names.
func TestCoherence(t *testing.T) {
	n, guests := boot(t)
	p := &pair{a: act(t, n, guests[0]), b: act(t, n, guests[1])}
	for _, sc := range scenarios {
		for range 3 {
			if _, seen := p.round(t, sc, 0, !sc.soon); seen != "" {
				t.Errorf("%s: the other node still sees %q", sc.name, seen)
			}
		}
	}
}

// TestStaleness measures, for the mount options in KRGIMAGE_TEST_NFS_OPTIONS,
// how long the second node takes to see a change.
func TestStaleness(t *testing.T) {
	options, set := os.LookupEnv("KRGIMAGE_TEST_NFS_OPTIONS")
	if !set {
		t.Skip("a measurement: set KRGIMAGE_TEST_NFS_OPTIONS, to nothing for the usual options")
	}
	n, guests := boot(t, strings.Fields(options)...)
	p := &pair{a: act(t, n, guests[0]), b: act(t, n, guests[1])}
	for _, sc := range scenarios {
		delay, seen := p.round(t, sc, 5*time.Second, false)
		if seen != "" {
			t.Logf("%-40s never: %q", sc.name, seen)
			continue
		}
		t.Logf("%-40s %6.2f s", sc.name, delay.Seconds())
	}
}
