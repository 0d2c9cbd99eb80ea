package control

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"os/exec"
)

type machine struct{ got []Request }

func (m *machine) Handle(r Request) (Answer, error) {
	m.got = append(m.got, r)
	if r.Command == "explode" {
		return Answer{}, errors.New("no")
	}
	return Answer{Log: "said " + r.Service}, nil
}

// serve runs a server and returns its socket.
func serve(t *testing.T, m Machine) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control.sock")
	if err := os.WriteFile(path, nil, 0o644); err != nil { // a stale one
		t.Fatal(err)
	}
	s, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, m) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path
}

func TestCall(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("the control socket answers root only")
	}
	ctx := context.Background()
	m := &machine{}
	path := serve(t, m)
	a, err := Call(ctx, Request{Command: "log", Service: "sshd"}, filepath.Join(t.TempDir(), "none"), path)
	if err != nil || a.Log != "said sshd" {
		t.Errorf("Call = %+v, %v", a, err)
	}
	if _, err := Call(ctx, Request{Command: "explode"}, path); err == nil || err.Error() != "no" {
		t.Errorf("error = %v", err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("nonsense\n")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1000)
	if n, _ := conn.Read(buf); !strings.Contains(string(buf[:n]), "bad request") {
		t.Errorf("answer to nonsense: %q", buf[:n])
	}
	if len(m.got) != 2 {
		t.Errorf("machine got %v", m.got)
	}
	if _, err := Call(ctx, Request{}, "/nonexistent/socket"); err == nil || !strings.Contains(err.Error(), "isn't a running node") {
		t.Errorf("without a socket: %v", err)
	}
}

// TestOthersAreRefused calls as another user, first against the socket's mode
// and then, with the mode opened, against the server's own check.
func TestOthersAreRefused(t *testing.T) {
	if path := os.Getenv("CONTROL_SOCKET"); path != "" {
		_, err := Call(context.Background(), Request{Command: "poweroff"}, path)
		if err == nil || !strings.Contains(err.Error(), "only root") {
			t.Errorf("error = %v", err)
		}
		return
	}
	if os.Getuid() != 0 {
		t.Skip("needs root to become another user")
	}
	m := &machine{}
	path := serve(t, m)
	// The test binary and the socket lie below directories of root's alone.
	binary := filepath.Join("/tmp", "control-test-"+filepath.Base(filepath.Dir(path)))
	text, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(binary, text, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(binary)
	for d := filepath.Dir(path); d != "/tmp" && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, mode := range []os.FileMode{0o600, 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(binary, "-test.run=^TestOthersAreRefused$")
		cmd.Env = []string{"CONTROL_SOCKET=" + path}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		cmd.Dir = "/"
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("mode %o: %v\n%s", mode, err, out)
		}
	}
	if len(m.got) != 0 {
		t.Errorf("machine got %v", m.got)
	}
}
