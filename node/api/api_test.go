package api

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain lets the test binary be a caller with another user id.
func TestMain(m *testing.M) {
	if path := os.Getenv("KRG_TEST_SOCKET"); path != "" {
		err := NewClient(path).Add(context.Background(), []int{2})
		if errors.Is(err, unix.EPERM) {
			os.Exit(42)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func serve(t *testing.T, b Backend) (path string, c *Client) {
	t.Helper()
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	_ = os.Chmod(dir, 0o755)
	path = filepath.Join(dir, SocketName)
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- NewServer(b, slog.New(slog.DiscardHandler)).Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path, NewClient(filepath.Join(dir, "none.sock"), path)
}

func TestStatusAddDel(t *testing.T) {
	f := NewFake(Status{SessionID: 7, NodeID: 1, Nodes: []Node{{ID: 1, State: Online}, {ID: 2, State: Present}}})
	_, c := serve(t, f)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if os.Getuid() != 0 {
		if err := c.Add(ctx, []int{2}); !errors.Is(err, unix.EPERM) {
			t.Fatalf("add without root: %v", err)
		}
		t.Skip("adding nodes needs root")
	}
	online := make(chan int, 16)
	go func() {
		for s, err := range c.Watch(ctx) {
			if err != nil {
				t.Error(err)
				return
			}
			online <- s.Online()
		}
	}()
	if n := <-online; n != 1 {
		t.Errorf("%d online at first", n)
	}
	if err := c.Add(ctx, []int{2}); err != nil {
		t.Fatal(err)
	}
	if n := <-online; n != 2 {
		t.Errorf("%d online after add", n)
	}
	for _, tc := range []struct {
		do   func(context.Context, []int) error
		ids  []int
		want error
	}{{c.Add, []int{2}, unix.EPERM}, {c.Add, []int{9}, unix.ENONET}, {c.Del, []int{1}, unix.EPERM}, {c.Del, []int{2}, nil}} {
		if err := tc.do(ctx, tc.ids); !errors.Is(err, tc.want) {
			t.Errorf("%v: %v, want %v", tc.ids, err, tc.want)
		}
	}
	s, err := c.Status(ctx)
	if err != nil || s.SessionID != 7 || s.Find(2).State != Present || s.Find(9).State != Possible || !s.Running {
		t.Errorf("status %+v, %v", s, err)
	}
	if err := errors.Join(c.Poweroff(ctx), c.Reboot(ctx)); err != nil || len(f.Calls()) != 2 {
		t.Errorf("%v, calls %q", err, f.Calls())
	}
}

func TestOnlyRoot(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("becoming somebody else needs root")
	}
	f := NewFake(Status{NodeID: 1, Nodes: []Node{{ID: 1, State: Online}, {ID: 2, State: Present}}})
	path, _ := serve(t, f)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(filepath.Dir(path), "caller")
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Env = []string{"KRG_TEST_SOCKET=" + path}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	var exit *exec.ExitError
	if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 42 {
		t.Errorf("a user's add: %v, want EPERM", err)
	}
	if n := f.Status().Online(); n != 1 {
		t.Errorf("a user added a node")
	}
}

func TestNobodyThere(t *testing.T) {
	if _, err := NewClient(filepath.Join(t.TempDir(), "x")).Status(t.Context()); !errors.Is(err, unix.ENOSYS) {
		t.Errorf("%v, want ENOSYS", err)
	}
}

func TestError(t *testing.T) {
	if e := AsError(Errorf(unix.EAGAIN, "later")); e.Number() != unix.EAGAIN || !errors.Is(e, unix.EAGAIN) || errors.Is(e, unix.EPERM) {
		t.Errorf("%+v", e)
	}
	if e := AsError(os.ErrClosed); e.Errno != "EIO" {
		t.Errorf("%+v", e)
	}
}
