package supervise

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/node/retry"
)

// fakeClock never waits: it notes every wait and moves its time along.
type fakeClock struct {
	mu    sync.Mutex
	now   time.Time
	waits []time.Duration
	hook  func(n int, d time.Duration) // called with the number of waits so far
}

func (c *fakeClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *fakeClock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func (c *fakeClock) After(d time.Duration) <-chan time.Time {
	c.advance(d)
	c.mu.Lock()
	c.waits = append(c.waits, d)
	n := len(c.waits)
	c.mu.Unlock()
	if c.hook != nil {
		c.hook(n, d)
	}
	ch := make(chan time.Time, 1)
	ch <- time.Time{}
	return ch
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func shell(script string) func() (*exec.Cmd, error) {
	return func() (*exec.Cmd, error) { return exec.Command("/bin/sh", "-c", script), nil }
}

func TestRestartsWithBackoffAndResets(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	clock := &fakeClock{}
	clock.hook = func(n int, _ time.Duration) {
		if n == 6 {
			cancel()
		}
	}
	starts := 0
	u := New(Service{
		Name: "x", Command: shell("echo run; exit 3"), BackoffMin: time.Second, BackoffMax: 4 * time.Second, Stable: time.Minute,
		OnStart: func(int) {
			if starts++; starts == 5 {
				clock.advance(time.Hour) // this run was a long one
			}
		},
	}, NewReaper(false), clock, quiet())
	if err := u.Run(ctx); err != nil {
		t.Fatal(err)
	}
	want := []time.Duration{1, 2, 4, 4, 1, 2}
	for i := range want {
		want[i] *= time.Second
	}
	if !slices.Equal(clock.waits, want) {
		t.Errorf("waits = %v, want %v", clock.waits, want)
	}
	s := u.Status()
	if s.State != Stopped || s.LastExit != "exit status 3" || s.Starts != starts {
		t.Errorf("status = %+v", s)
	}
	if got := strings.Count(string(u.Log().Bytes()), "run\n"); got != starts {
		t.Errorf("log has %d runs, want %d", got, starts)
	}
}

func TestStop(t *testing.T) {
	for _, tc := range []struct {
		name, script, exit string
		timeout            time.Duration
	}{
		{"on SIGTERM", "echo up; exec sleep 1000", "killed by SIGTERM", time.Hour},
		{"in order", "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done", "exit status 7", time.Hour},
		{"by SIGKILL", "trap '' TERM; echo up; while :; do sleep 0.05; done", "killed by SIGKILL", time.Millisecond},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			u := New(Service{Name: "x", Command: shell(tc.script), StopTimeout: tc.timeout, Tee: onWrite(cancel)}, NewReaper(false), retry.System{}, quiet())
			if err := u.Run(ctx); err != nil {
				t.Fatal(err)
			}
			if s := u.Status(); s.State != Stopped || s.PID != 0 || s.LastExit != tc.exit {
				t.Errorf("status = %+v, want exit %q", s, tc.exit)
			}
		})
	}
}

// onWrite is a writer that calls f: the service says that it is up.
type onWrite func()

func (f onWrite) Write(p []byte) (int, error) { f(); return len(p), nil }

func TestCommandFails(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	clock := &fakeClock{hook: func(n int, _ time.Duration) {
		if n == 2 {
			cancel()
		}
	}}
	calls := 0
	u := New(Service{Name: "x", Command: func() (*exec.Cmd, error) {
		if calls++; calls == 1 {
			return nil, errors.New("no such thing")
		}
		return exec.Command("/nonexistent"), nil
	}}, NewReaper(false), clock, quiet())
	if err := u.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if s := u.Status(); calls != 2 || !strings.Contains(s.LastExit, "/nonexistent") {
		t.Errorf("calls %d, status %+v", calls, s)
	}
}

// TestReaperOfInit needs a process of its own: a waiter for any child would
// steal the results of other tests.
func TestReaperOfInit(t *testing.T) {
	if os.Getenv("SUPERVISE_INIT") == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestReaperOfInit$", "-test.v")
		cmd.Env = append(os.Environ(), "SUPERVISE_INIT=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	r := NewReaper(true)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.ReapAll(ctx) }()
	var children []*Child
	for range 50 { // short-lived ones end before Start returns
		c, err := r.Start(exec.Command("/bin/sh", "-c", "(exit 0) & exit 5"))
		if err != nil {
			t.Fatal(err)
		}
		children = append(children, c)
	}
	for _, c := range children {
		<-c.Done()
		if got := Describe(c.Status()); got != "exit status 5" {
			t.Errorf("pid %d: %s", c.PID, got)
		}
		if err := c.Signal(unix.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("signal to a reaped process: %v", err)
		}
	}
	// The orphans have been adopted; they must go, too.
	for {
		if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); errors.Is(err, unix.ECHILD) {
			break
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestStartRefusesWriters(t *testing.T) {
	cmd := exec.Command("/bin/true")
	cmd.Stdout = &bytes.Buffer{}
	if _, err := NewReaper(false).Start(cmd); err == nil {
		t.Error("a command with a copying goroutine was accepted")
	}
}

func TestRing(t *testing.T) {
	for _, tc := range []struct {
		name   string
		writes []string
		want   string
	}{
		{"empty", nil, ""},
		{"fits", []string{"ab\n", "cd\n"}, "ab\ncd\n"},
		{"loses whole lines", []string{"first\n", "second\n", "third\n"}, "second\nthird\n"},
		{"one long write", []string{"0123456789abcdefghij"}, "456789abcdefghij"},
		{"exactly full", []string{"0123456789abcdef"}, "0123456789abcdef"},
		{"one byte more", []string{"0123456789abcdef", "X"}, "123456789abcdefX"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := NewRing(16)
			for _, w := range tc.writes {
				if n, err := r.Write([]byte(w)); n != len(w) || err != nil {
					t.Fatalf("Write = %d, %v", n, err)
				}
			}
			if got := string(r.Bytes()); got != tc.want {
				t.Errorf("Bytes = %q, want %q", got, tc.want)
			}
		})
	}
	r := NewRing(64)
	_, _ = r.Write([]byte("a\nb\nc\n"))
	for n, want := range map[int]string{1: "c", 2: "b\nc", 9: "a\nb\nc"} {
		if got := string(r.Tail(n)); got != want {
			t.Errorf("Tail(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestRingSince(t *testing.T) {
	r := NewRing(16)
	var got strings.Builder
	var at uint64
	for _, w := range []string{"", "ab\n", "cd\nef", "\n0123456789\n", "x\n"} {
		r.Write([]byte(w))
		text, end := r.Since(at)
		got.Write(text)
		at = end
	}
	if want := "ab\ncd\nef\n0123456789\nx\n"; got.String() != want || at != uint64(len(want)) {
		t.Errorf("%q, %d bytes; want %q", got.String(), at, want)
	}
	r.Write([]byte("a line that is lost\nkept\n"))
	if text, _ := r.Since(at); string(text) != "kept\n" {
		t.Errorf("after a loss: %q", text)
	}
	if text, _ := r.Since(1000); string(text) != "kept\n" {
		t.Errorf("of another ring: %q", text)
	}
}
