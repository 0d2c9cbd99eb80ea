package gate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"krgimage/services/pids"
)

// local is the range of the test's own processes: all that this machine gives.
var local = pids.Range{First: pids.FirstUser, End: 1 << 20}

// far is a process of another node.
const far = 1<<20 + 17

func TestFilter(t *testing.T) {
	r, _ := pids.Of(3)
	vm, err := bpf.NewVM(filter(r))
	if err != nil {
		t.Fatal(err)
	}
	const all, none, refused = "notify", "allow", "nosys"
	mine, other, initPID := uint64(r.First+5), uint64(r.End+5), uint64(1)
	minus := func(n int64) uint64 { return uint64(-n) }
	for _, tc := range []struct {
		nr   int
		args [2]uint64
		want string
	}{
		{unix.SYS_FORK, [2]uint64{}, all}, {unix.SYS_VFORK, [2]uint64{}, all},
		{unix.SYS_CLONE, [2]uint64{uint64(unix.SIGCHLD)}, all},
		{unix.SYS_CLONE, [2]uint64{unix.CLONE_VM | unix.CLONE_VFORK | uint64(unix.SIGCHLD)}, all},
		{unix.SYS_CLONE, [2]uint64{unix.CLONE_VM | unix.CLONE_THREAD | unix.CLONE_SIGHAND}, none},
		{unix.SYS_CLONE3, [2]uint64{}, refused},
		{unix.SYS_READ, [2]uint64{other}, none}, {unix.SYS_GETPID, [2]uint64{}, none},
		{unix.SYS_KILL, [2]uint64{mine, 9}, none}, {unix.SYS_KILL, [2]uint64{uint64(r.First)}, none}, {unix.SYS_KILL, [2]uint64{uint64(r.End - 1)}, none},
		{unix.SYS_KILL, [2]uint64{other, 9}, all}, {unix.SYS_KILL, [2]uint64{uint64(r.End)}, all}, {unix.SYS_KILL, [2]uint64{uint64(r.First - 1)}, all},
		{unix.SYS_KILL, [2]uint64{initPID}, none}, {unix.SYS_KILL, [2]uint64{pids.Max}, none},
		{unix.SYS_KILL, [2]uint64{0}, all}, {unix.SYS_KILL, [2]uint64{minus(1)}, all}, {unix.SYS_KILL, [2]uint64{minus(int64(mine))}, all},
		{unix.SYS_TGKILL, [2]uint64{other}, all}, {unix.SYS_TGKILL, [2]uint64{mine}, none}, {unix.SYS_TGKILL, [2]uint64{minus(1)}, none},
		{unix.SYS_TKILL, [2]uint64{other}, all}, {unix.SYS_RT_SIGQUEUEINFO, [2]uint64{other}, all},
		{unix.SYS_GETPGID, [2]uint64{0}, none}, {unix.SYS_GETPGID, [2]uint64{other}, all},
		{unix.SYS_PRLIMIT64, [2]uint64{0}, none}, {unix.SYS_PRLIMIT64, [2]uint64{other}, all},
		{unix.SYS_GETPRIORITY, [2]uint64{0, other}, all}, {unix.SYS_GETPRIORITY, [2]uint64{0, 0}, none}, {unix.SYS_GETPRIORITY, [2]uint64{1, mine}, none},
		{unix.SYS_IOPRIO_GET, [2]uint64{3, other}, none}, {unix.SYS_IOPRIO_GET, [2]uint64{1, other}, all},
		{unix.SYS_PTRACE, [2]uint64{0, other}, none},
	} {
		// The test machine reads big-endian, the kernel's the machine's own order:
		// each word is laid out for it.
		data := make([]byte, 64)
		put := func(off int, v uint32) {
			data[off], data[off+1], data[off+2], data[off+3] = byte(v>>24), byte(v>>16), byte(v>>8), byte(v)
		}
		put(offNr, uint32(tc.nr))
		put(offArch, auditX8664)
		for i, a := range tc.args {
			put(offArgs+8*i, uint32(a))
		}
		n, err := vm.Run(data)
		if err != nil {
			t.Fatal(err)
		}
		got := map[uint32]string{uint32(allow.Val): none, uint32(notify.Val): all, uint32(nosys.Val): refused}[uint32(n)]
		if got != tc.want {
			t.Errorf("call %d %x: %s (%#x), want %s", tc.nr, tc.args, got, n, tc.want)
		}
		put(offArch, 0x40000003)
		if n, _ := vm.Run(data); uint32(n) != uint32(allow.Val) {
			t.Errorf("call %d of a 32-bit program: %#x", tc.nr, n)
		}
	}
}

// inside is the child: it installs the gate and does what its input says.
func TestInside(t *testing.T) {
	if os.Getenv("GATE_INSIDE") == "" {
		t.Skip("a part of the other tests")
	}
	if err := Install(local); err != nil {
		fmt.Println("skip", err)
		os.Exit(0)
	}
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		switch f[0] {
		case "kill":
			err := unix.Kill(far, 0)
			fmt.Println("done", err)
		case "killgo": // many at once, from several threads
			var group sync.WaitGroup
			var bad atomic.Int32
			for range 64 {
				group.Go(func() {
					// Not unix.Kill: it would keep a processor of the runtime while it waits.
					if _, _, err := unix.Syscall(unix.SYS_KILL, far, 0, 0); err != unix.EPERM {
						bad.Add(1)
					}
				})
			}
			group.Wait()
			fmt.Println("done", bad.Load())
		case "sh":
			out, err := exec.Command("sh", "-c", strings.TrimPrefix(lines.Text(), "sh ")).CombinedOutput()
			fmt.Println("done", strings.TrimSpace(string(out)), err)
		}
	}
	os.Exit(0)
}

// world is a child behind a gate.
type world struct {
	t   *testing.T
	pid int
	in  io.Writer
	out *bufio.Reader
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("the gate needs root")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestInside$")
	cmd.Env = append(os.Environ(), "GATE_INSIDE=1")
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL} // it can't end by itself when nobody serves the gate
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w := &world{t, cmd.Process.Pid, in, bufio.NewReader(out)}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	line := w.read()
	if strings.HasPrefix(line, "skip") {
		t.Skip(line)
	}
	if line != "ready" {
		t.Fatalf("child says %q", line)
	}
	return w
}

func (w *world) read() string {
	w.t.Helper()
	line, err := w.out.ReadString('\n')
	if err != nil {
		w.t.Fatalf("child: %v", err)
	}
	return strings.TrimSpace(line)
}

func (w *world) do(command string) { fmt.Fprintln(w.in, command) }

// serve serves the gate until the returned function is called.
func (w *world) serve(file string, h Handler) (stop func()) {
	w.t.Helper()
	listener, err := Take(w.pid)
	if err != nil {
		w.t.Fatal(err)
	}
	p, err := OpenPending(file)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, listener, p, h) }()
	return func() {
		w.t.Helper()
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("serve: %v", err)
		}
		p.Close()
	}
}

// answers lets forks pass and refuses to signal the far process.
func answers(_ *Gate, c Call) (Answer, bool) {
	if c.Nr == unix.SYS_KILL && c.Args[0] == far {
		return Fail(unix.EPERM), true
	}
	return Kernel, true
}

func TestServe(t *testing.T) {
	w := newWorld(t)
	defer w.serve(filepath.Join(t.TempDir(), "pending"), answers)()
	for _, tc := range []struct{ command, want string }{
		{"kill", "done operation not permitted"},
		{"killgo", "done 0"},
		{"sh for i in 1 2 3; do /bin/echo $i; done | wc -l", "done 3 <nil>"},
		{"sh kill -0 " + fmt.Sprint(far) + " 2>&1 | grep -c permitted", "done 1 <nil>"},
		{"sh kill -0 $$ && echo local", "done local <nil>"},
	} {
		w.do(tc.command)
		if got := w.read(); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.command, got, tc.want)
		}
	}
}

// A daemon that goes away and comes back in the middle of forks and kills loses
// and fails none.
func TestRestartUnderLoad(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "pending")
	stop := w.serve(file, answers)
	w.do("sh i=0; while [ $i -lt 100 ]; do /bin/true || echo bad; kill -0 " + fmt.Sprint(far) + " 2>/dev/null && echo bad; i=$((i+1)); done; echo $i")
	result := make(chan string)
	go func() { result <- w.read() }()
	for restarts := 0; ; restarts++ {
		stop()
		stop = w.serve(file, answers)
		select {
		case got := <-result:
			stop()
			if got != "done 100 <nil>" {
				t.Errorf("after %d restarts: %q", restarts, got)
			}
			if restarts < 3 {
				t.Errorf("only %d restarts: nothing was tested", restarts)
			}
			return
		default:
		}
	}
}

// Calls that a daemon had taken and not answered when it died are answered by
// the next.
func TestCallsInWorkSurvive(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "pending")
	taken := make(chan struct{}, 64)
	stop := w.serve(file, func(g *Gate, c Call) (Answer, bool) {
		if c.Nr == unix.SYS_KILL {
			taken <- struct{}{}
			return Answer{}, false // and never again
		}
		return Kernel, true
	})
	w.do("killgo")
	for range 64 {
		<-taken
	}
	stop()
	defer w.serve(file, answers)()
	if got := w.read(); got != "done 0" {
		t.Errorf("%q", got)
	}
}

func TestTakeFromNobody(t *testing.T) {
	if _, err := Take(os.Getpid()); !errors.Is(err, unix.EBADF) && !errors.Is(err, unix.EPERM) {
		t.Errorf("took a gate that isn't there: %v", err)
	}
}

// A file of an earlier container is of no consequence.
func TestStalePending(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "pending")
	p, err := OpenPending(file)
	if err != nil {
		t.Fatal(err)
	}
	p.begin(Call{ID: 12345, TID: 1, Nr: unix.SYS_KILL, Args: [6]uint64{far}})
	p.Close()
	var kills atomic.Int32
	stop := w.serve(file, func(g *Gate, c Call) (Answer, bool) {
		if c.Nr == unix.SYS_KILL {
			kills.Add(1)
		}
		return answers(g, c)
	})
	w.do("sh echo on")
	if got := w.read(); got != "done on <nil>" {
		t.Errorf("%q", got)
	}
	stop()
	if kills.Load() != 0 {
		t.Error("a call of another time was carried out")
	}
}
