package test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// bootLimit is how long a boot of two nodes may take before the test gives up.
// Without hardware acceleration on a busy machine, minutes are normal.
const bootLimit = 8 * time.Minute

// site is a directory with a cluster.yaml, as an admin has it.
type site struct {
	t   testing.TB
	dir string
	bin string
	uid uint32 // who runs it; 0 is root
}

// newSite makes an empty site. Tests without QEMU or root are skipped with the
// reason, but never in CI.
func newSite(t testing.TB) *site {
	t.Helper()
	bin := os.Getenv("KRGIMAGE")
	if bin == "" {
		bin = "../bin/krgimage"
	}
	bin, err := filepath.Abs(bin)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(bin); err != nil {
		t.Fatalf("no krgimage to test: run make first (%v)", err)
	}
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("CI doesn't run as root: the end-to-end tests can't")
		}
		t.Skip("needs root: the shared root has files of every user")
	}
	return &site{t: t, dir: t.TempDir(), bin: bin}
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

// command is krgimage with the arguments, in the site's directory. Arguments
// that begin with "ip" are a whole command line: krgimage in a namespace.
func (s *site) command(ctx context.Context, args ...string) *exec.Cmd {
	program := s.bin
	if args[0] == "ip" {
		program, args = args[0], args[1:]
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = s.dir
	if s.uid != 0 {
		cmd.Env = append(os.Environ(), "HOME="+s.dir, "TMPDIR="+s.dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: s.uid, Gid: s.uid}}
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	return cmd
}

// try runs krgimage and returns what it printed.
func (s *site) try(limit time.Duration, args ...string) (stdout, stderr string, err error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := s.command(ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// run is try for commands that must succeed; it returns the output.
func (s *site) run(limit time.Duration, args ...string) string {
	s.t.Helper()
	out, errs, err := s.try(limit, args...)
	if err != nil {
		s.t.Fatalf("krgimage %s: %v\n%s%s", strings.Join(args, " "), err, out, errs)
	}
	return out
}

// fails is try for commands that must fail, with words of the message.
func (s *site) fails(want string, args ...string) {
	s.t.Helper()
	out, errs, err := s.try(time.Minute, args...)
	if err == nil {
		s.t.Errorf("krgimage %s succeeded, want an error with %q\n%s", strings.Join(args, " "), want, out)
		return
	}
	if !strings.Contains(errs, want) {
		s.t.Errorf("krgimage %s said\n%s\nwant %q in it", strings.Join(args, " "), errs, want)
	}
	if strings.Contains(errs, "goroutine ") {
		s.t.Errorf("krgimage %s died with a stack trace:\n%s", strings.Join(args, " "), errs)
	}
}

// decode runs a command that prints JSON.
func (s *site) decode(v any, args ...string) {
	s.t.Helper()
	out := s.run(time.Minute, args...)
	if err := json.Unmarshal([]byte(out), v); err != nil {
		s.t.Fatalf("krgimage %s printed no JSON: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// edit replaces a piece of cluster.yaml.
func (s *site) edit(old, new string) {
	s.t.Helper()
	file := s.path("cluster.yaml")
	data, err := os.ReadFile(file)
	if err != nil {
		s.t.Fatal(err)
	}
	if !strings.Contains(string(data), old) {
		s.t.Fatalf("cluster.yaml has no %q to edit", old)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(string(data), old, new, 1)), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// trialNode is a machine in `trial status --json`.
type trialNode struct {
	ID       int     `json:"id"`
	Hostname string  `json:"hostname"`
	Address  string  `json:"address"`
	SSH      string  `json:"ssh"`
	Stage    string  `json:"stage"`
	Seconds  float64 `json:"seconds"`
	PID      int     `json:"pid"`
	Log      string  `json:"log"`
}

// bootedNode is a machine in `nodes --json`.
type bootedNode struct {
	ID       int    `json:"id"`
	Hostname string `json:"hostname"`
	Address  string `json:"address"`
	Boot     *struct {
		Started time.Time `json:"started"`
		Events  []struct {
			Stage string    `json:"stage"`
			At    time.Time `json:"at"`
		} `json:"events"`
	} `json:"boot"`
}

func (s *site) trialNodes() []trialNode {
	s.t.Helper()
	var report struct{ Nodes []trialNode }
	s.decode(&report, "trial", "status", "--json")
	return report.Nodes
}

func (s *site) nodes() []bootedNode {
	s.t.Helper()
	var list []bootedNode
	s.decode(&list, "nodes", "--json")
	return list
}

// reached says whether a boot of the node that began after a moment has come to
// a stage.
func (s *site) reached(node int, stage string, after time.Time) bool {
	s.t.Helper()
	for _, n := range s.nodes() {
		if n.ID != node || n.Boot == nil || !n.Boot.Started.After(after) {
			continue
		}
		for _, e := range n.Boot.Events {
			if e.Stage == stage {
				return true
			}
		}
	}
	return false
}

// startTrial boots a cluster and stops it at the end of the test. If the test
// fails, the end of every console is shown.
func (s *site) startTrial(args ...string) {
	s.t.Helper()
	s.t.Cleanup(func() {
		if s.t.Failed() {
			s.showConsoles()
		}
		if _, _, err := s.try(2*time.Minute, "trial", "status"); err == nil {
			s.run(2*time.Minute, "trial", "stop")
		}
	})
	s.t.Log(s.run(bootLimit, append([]string{"trial", "--keep"}, args...)...))
}

func (s *site) showConsoles() {
	logs, _ := filepath.Glob(s.path("state/trial/*.log"))
	for _, log := range logs {
		data, err := os.ReadFile(log)
		if err == nil {
			s.t.Logf("end of %s:\n%s", filepath.Base(log), data[max(0, len(data)-4000):])
		}
	}
}

// ssh runs a command on a node as a user and returns its output.
func (s *site) ssh(user string, node int, command string) string {
	s.t.Helper()
	return strings.TrimSpace(s.run(2*time.Minute, "ssh", "--user", user, strconv.Itoa(node), "--", command))
}

// waitFor polls a condition until it holds.
func waitFor(t testing.TB, limit time.Duration, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v in vain: %s", limit, what)
		}
		time.Sleep(500 * time.Millisecond)
	}
}
