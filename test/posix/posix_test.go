package posix

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"krgimage/nfsroot/nfs"
	"krgimage/test/uml"
)

func TestMain(m *testing.M) {
	os.Exit(uml.Main(m, map[string]uml.Program{
		"posix": func(args []string) int {
			r := Run(args[0], limits, nil)
			_ = json.NewEncoder(os.Stdout).Encode(r)
			return 0
		},
		"model": model,
	}))
}

// TestHere checks the checks: a local file system of this machine passes.
func TestHere(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it acts as several users")
	}
	report(t, Run(place(t), nil, nil))
}

// place is a directory that every user can reach.
func place(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "posix")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func report(t *testing.T, r Result) {
	t.Helper()
	t.Logf("%d facts hold, %d don't, %d are known limits", r.Passed, len(r.Failed), len(r.Limited))
	for _, f := range r.Failed {
		t.Error(f)
	}
	for _, f := range r.Limited {
		t.Log("limit: ", f)
	}
	for _, c := range r.Healed {
		t.Errorf("%q is no limit any more: take it out of the list and the documentation", c)
	}
	if r.Passed < 4500 {
		t.Errorf("only %d facts were checked", r.Passed)
	}
}

// TestNFS is the conformance run: Linux's NFS client on the product's server.
func TestNFS(t *testing.T) {
	uml.Need(t)
	n := uml.NewNet(t)
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	n.Serve(t, nfs.Config{HandleKey: []byte("conformance handle key"), Exports: []nfs.Export{{Path: "/", Dir: dir}}})
	g := n.Boot(t, "client")
	g.Mount(t, uml.Port, "/", "/mnt/root")
	var r Result
	if err := json.Unmarshal([]byte(g.Must(t, uml.Call("posix", "/mnt/root"))), &r); err != nil {
		t.Fatal(fmt.Errorf("the run's result: %w", err))
	}
	report(t, r)
}

// limits of NFS version 3 and of Linux's client. docs/nfs.md explains them.
var limits = []Limit{
	{"utimensat/*/0/?time", "the client's first representable second has no nanoseconds"},
	{"utimensat/*/4294967295/mtime", "nor has the last one: times are 32 bits (RFC 1813 section 2.6, nfstime3)"},
	{"utimensat/*/4294967296/?time", "times end in 2106"},
	{"rename2/*", "RENAME has no flags (RFC 1813 section 3.3.14)"},
	{"*/open/links*", "the client renames an open file instead of removing it, and removes it at the last close"},
	{"fallocate/*", "no procedure allocates or punches holes; posix_fallocate(3) writes zeros instead"},
	{"xattr/*", "no procedure carries extended attributes"},
}

// TestTwoMounts compares a file with a model of it while two mounts that share
// no cache, as two nodes', take turns with it.
func TestTwoMounts(t *testing.T) {
	uml.Need(t)
	n := uml.NewNet(t)
	n.Serve(t, nfs.Config{HandleKey: []byte("conformance handle key"), Exports: []nfs.Export{{Path: "/", Dir: t.TempDir()}}})
	g := n.Boot(t, "client")
	for _, dir := range []string{"/mnt/a", "/mnt/b"} {
		g.Mount(t, uml.Port, "/", dir, "nosharecache")
	}
	for seed := range 2 {
		g.Must(t, uml.Call("model", "/mnt/a", "/mnt/b", strconv.Itoa(seed)))
	}
}

// modelSteps is how often each run opens the file; it does several operations
// each time.
const modelSteps = 500

func model(args []string) int {
	seed, err := strconv.ParseUint(args[2], 10, 64)
	if err == nil {
		name := "model" + args[2]
		err = Model(filepath.Join(args[0], name), filepath.Join(args[1], name), seed, modelSteps)
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}
