package kernel

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"krgimage/services/capability"
)

// open loads a table of its own on a bpf file system of the test.
func open(t *testing.T) (*Table, string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("BPF programs need root")
	}
	fs := t.TempDir()
	if err := unix.Mount("bpf", fs, "bpf", 0, "mode=0700"); err != nil {
		t.Skipf("no bpf file system: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(fs, unix.MNT_DETACH) })
	dir := filepath.Join(fs, "capability")
	table, err := Open(dir)
	if err != nil {
		t.Skipf("this kernel can't keep capability sets: %v", err)
	}
	t.Cleanup(func() { table.Close() })
	t.Log("hook:", table.Hook())
	return table, dir
}

// process is a living process with its descriptor.
func process(t *testing.T, pid int) int {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func start(t *testing.T, argv ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

func TestInheritance(t *testing.T) {
	table, _ := open(t)
	self := process(t, os.Getpid())
	if _, err := table.Get(self); !errors.Is(err, capability.ErrNoProcess) {
		t.Fatalf("a process outside has sets: %v", err)
	}
	mine := capability.Sets{Permitted: 0o1067, Effective: 0o7, InheritablePermitted: 0o67, InheritableEffective: 0o5}
	if err := table.Set(self, mine); err != nil {
		t.Fatal(err)
	}
	child := process(t, start(t, "sleep", "1000").Process.Pid)
	got, err := table.Get(child)
	if err != nil || got != mine.Fork() {
		t.Errorf("child has %+v, %v; want %+v", got, err, mine.Fork())
	}
	if got, _ := table.Get(self); got != mine {
		t.Errorf("parent has %+v now", got)
	}
}

// Many forks at once, while the parent's sets are written to all the time: each
// child has what the rules say.
func TestExactUnderLoad(t *testing.T) {
	table, _ := open(t)
	self := process(t, os.Getpid())
	mine := capability.Initial()
	if err := table.Set(self, mine); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var writing sync.WaitGroup
	writing.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				table.Set(self, mine)
				runtime.Gosched()
			}
		}
	})
	var forking sync.WaitGroup
	for range 2 {
		forking.Go(func() {
			for range 100 {
				cmd := exec.Command("cat") // waits for its input to end
				in, err := cmd.StdinPipe()
				if err != nil {
					t.Error(err)
					return
				}
				if err := cmd.Start(); err != nil {
					t.Error(err)
					return
				}
				fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
				if err == nil {
					var got capability.Sets
					if got, err = table.Get(fd); err == nil && got != mine.Fork() {
						err = fmt.Errorf("child has %+v", got)
					}
					unix.Close(fd)
				}
				if err != nil {
					t.Error(err)
				}
				in.Close()
				cmd.Wait()
			}
		})
	}
	forking.Wait()
	close(stop)
	writing.Wait()
	if n, err := table.Lost(); n != 0 || err != nil {
		t.Errorf("%d children lost their sets, %v", n, err)
	}
}

// Exec by a thread that isn't the leader replaces the leader, and the sets stay.
func TestExecByThread(t *testing.T) {
	if _, err := exec.LookPath("python3"); err != nil {
		t.Skip("no python3")
	}
	table, _ := open(t)
	self := process(t, os.Getpid())
	mine := capability.Initial()
	if err := table.Set(self, mine); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("python3", "-c", `import os, threading, sys
threading.Thread(target=lambda: os.execv("/bin/cat", ["cat"])).start()
threading.Event().wait()`)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	// cat echoes: then the exec is over.
	in.Write([]byte("x\n"))
	if _, err := out.Read(make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid))
	if strings.TrimSpace(string(name)) != "cat" {
		t.Fatalf("the process is %q", name)
	}
	got, err := table.Get(process(t, cmd.Process.Pid))
	if err != nil || got != mine.Fork() {
		t.Errorf("after exec: %+v, %v", got, err)
	}
}

// Another opener of the same pins sees the same sets, after the first is gone.
func TestPinsOutliveTheirMaker(t *testing.T) {
	table, dir := open(t)
	self := process(t, os.Getpid())
	mine := capability.Initial()
	if err := table.Set(self, mine); err != nil {
		t.Fatal(err)
	}
	hook := table.Hook()
	if err := table.Close(); err != nil {
		t.Fatal(err)
	}
	child := process(t, start(t, "sleep", "1000").Process.Pid) // forked while nobody has it open
	again, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if again.Hook() != hook {
		t.Errorf("hook %s, was %s", again.Hook(), hook)
	}
	for name, fd := range map[string]int{"parent": self, "child": child} {
		if got, err := again.Get(fd); err != nil || got != mine {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func TestGoneProcess(t *testing.T) {
	table, _ := open(t)
	cmd := start(t, "true")
	fd := process(t, cmd.Process.Pid)
	cmd.Wait()
	if _, err := table.Get(fd); !errors.Is(err, capability.ErrNoProcess) {
		t.Errorf("get: %v", err)
	}
	if err := table.Set(fd, capability.Initial()); !errors.Is(err, capability.ErrNoProcess) {
		t.Errorf("set: %v", err)
	}
}
