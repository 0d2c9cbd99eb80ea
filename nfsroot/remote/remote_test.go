package remote

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"krgimage/nfsroot/nfs"
)

// serve serves dir at /export/krg with krgimage's own server, to this machine
// unless refuse is set.
func serve(t *testing.T, dir string, refuse bool) Root {
	t.Helper()
	s, err := nfs.New(nfs.Config{
		Exports: []nfs.Export{{Path: "/export/krg", Dir: dir}}, HandleKey: make([]byte, 32),
		Allow: func(netip.Addr) bool { return !refuse },
	})
	if errors.Is(err, nfs.ErrPrivilege) || errors.Is(err, nfs.ErrNoHandles) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		s.Close()
	})
	at := l.Addr().(*net.TCPAddr).AddrPort()
	return Root{Server: at.Addr(), Port: int(at.Port()), Path: "/export/krg"}
}

func write(t *testing.T, dir, text string) {
	t.Helper()
	at := filepath.Join(dir, filepath.Join(imageFile...))
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	r := serve(t, dir, false)
	ctx := context.Background()
	if _, err := Check(ctx, r); !errors.Is(err, ErrNoImage) || !strings.Contains(err.Error(), "there is no /etc") {
		t.Errorf("an empty directory: %v", err)
	}
	write(t, dir, `{"name":"krg","build_id":"krg-20260102-abc"}`)
	if id, err := Check(ctx, r); err != nil || id != "krg-20260102-abc" {
		t.Errorf("Check = %q, %v", id, err)
	}
	write(t, dir, `{"build`)
	if _, err := Check(ctx, r); !errors.Is(err, ErrNoImage) || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a damaged image.json: %v", err)
	}
	other := r
	other.Path = "/export/other"
	if _, err := Check(ctx, other); !errors.Is(err, ErrNoPath) {
		t.Errorf("another path: %v", err)
	}
	other = r
	other.MountPort = freePort(t)
	if _, err := Check(ctx, other); !errors.Is(err, ErrNoAnswer) || !strings.Contains(err.Error(), "MOUNT") {
		t.Errorf("no MOUNT on its port: %v", err)
	}
}

func TestNobodyThere(t *testing.T) {
	r := Root{Server: netip.MustParseAddr("127.0.0.1"), Port: freePort(t), Path: "/"}
	if _, err := Check(context.Background(), r); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("nobody listens: %v", err)
	}
	if _, err := Check(context.Background(), serve(t, t.TempDir(), true)); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("a server that hangs up: %v", err)
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// TestNonsense answers each call with bytes that are no reply.
func TestNonsense(t *testing.T) {
	for name, answer := range map[string]string{
		"too long":    "\xff\xff\xff\xff",
		"empty parts": "\x00\x00\x00\x00",
		"short":       "\x80\x00\x00\x04\x00\x00\x00\x00",
		"text":        "HTTP/1.1 400 Bad Request\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				for {
					nc, err := l.Accept()
					if err != nil {
						return
					}
					nc.Read(make([]byte, 1024))
					nc.Write([]byte(answer))
					nc.Close()
				}
			}()
			at := l.Addr().(*net.TCPAddr).AddrPort()
			if _, err := Check(context.Background(), Root{Server: at.Addr(), Port: int(at.Port()), Path: "/"}); !errors.Is(err, ErrNoAnswer) {
				t.Errorf("Check: %v", err)
			}
		})
	}
}

func FuzzResults(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 7, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := &results{b: b}
		for !r.bad {
			if p := r.opaque(64); len(p) > 64 {
				t.Fatalf("%d bytes", len(p))
			}
			if len(r.b) == 0 {
				break
			}
		}
	})
}
