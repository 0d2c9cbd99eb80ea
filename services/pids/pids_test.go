package pids

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRanges(t *testing.T) {
	end := FirstUser
	for n := range Nodes {
		r, err := Of(n)
		if err != nil {
			t.Fatal(err)
		}
		if r.First != end {
			t.Fatalf("node %d begins at %d, the one before ends at %d", n, r.First, end)
		}
		end = r.End
		for _, pid := range []int{r.First, r.Turn(), r.End - 1} {
			if home, ok := Home(pid); !ok || home != n || !r.Has(pid) {
				t.Errorf("pid %d of node %d: home %d, %v", pid, n, home, ok)
			}
		}
	}
	if end != 4194304 {
		t.Errorf("the ranges end at %d", end)
	}
	for _, pid := range []int{-1, 0, 1, FirstUser - 1, Max} {
		if n, ok := Home(pid); ok {
			t.Errorf("pid %d has home %d", pid, n)
		}
	}
	for _, n := range []int{-1, Nodes} {
		if _, err := Of(n); err == nil {
			t.Errorf("node %d has a range", n)
		}
	}
}

// fake is an allocator that counts as the kernel's does.
type fake struct {
	last int
	err  error
}

func (f *fake) Last() (int, error)    { return f.last, f.err }
func (f *fake) SetLast(pid int) error { f.last = pid; return f.err }

func TestKeeper(t *testing.T) {
	r, _ := Of(3)
	c := &fake{last: 77}
	k, err := NewKeeper(c, r)
	if err != nil || c.last != r.First-1 {
		t.Fatalf("starts at %d, %v", c.last, err)
	}
	for _, tc := range []struct {
		last   int
		turned bool
	}{
		{r.First - 1, false}, {r.First, false}, {r.Turn() - 1, false}, {r.Turn(), true}, {r.End - 1, true},
		{r.End + 100, true}, {r.First - 2, true}, {FirstUser, true}, {0, true},
	} {
		c.last = tc.last
		turned, err := k.Step()
		if err != nil || turned != tc.turned || turned != (c.last == r.First-1 && tc.last != r.First-1) {
			t.Errorf("last %d: turned %v to %d, %v", tc.last, turned, c.last, err)
		}
	}
	c.err = errors.New("broken")
	if _, err := k.Step(); !errors.Is(err, c.err) {
		t.Errorf("error %v", err)
	}
}

// TestKernel runs the keeper as init of a PID namespace in which programs fork
// fourteen thousand times, more than a range has ids.
func TestKernel(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("PID namespaces need root")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestInsideNamespace$")
	cmd.Env = append(os.Environ(), "PIDS_INSIDE=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

func TestInsideNamespace(t *testing.T) {
	if os.Getenv("PIDS_INSIDE") == "" {
		t.Skip("a part of TestKernel")
	}
	if os.Getpid() != 1 {
		t.Fatal("not an init")
	}
	c, err := OpenCursor()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r, _ := Of(1) // below the smallest pid_max that machines have
	k, err := NewKeeper(c, r)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- k.Run(ctx, slog.New(slog.NewTextHandler(io.Discard, nil))) }()
	// $! is the pid of each child as the shell saw it.
	out, err := exec.Command("sh", "-c", `i=0; while [ $i -lt 7000 ]; do : & echo $!; : & echo $!; wait; i=$((i+1)); done`).Output()
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	lines := strings.Fields(string(out))
	if len(lines) != 14000 {
		t.Fatalf("%d children", len(lines))
	}
	turns, last := 0, 0
	for _, l := range lines {
		var pid int
		fmt.Sscan(l, &pid)
		if !r.Has(pid) {
			t.Fatalf("pid %d is outside of %+v", pid, r)
		}
		if pid < last {
			turns++
		}
		last = pid
	}
	if turns == 0 {
		t.Error("the range was never turned over: nothing was tested")
	}
	seen := slices.Compact(slices.Sorted(slices.Values(lines)))
	fmt.Printf("14000 forks, %d turns, %d different pids\n", turns, len(seen))
}
