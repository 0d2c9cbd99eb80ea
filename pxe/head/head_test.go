package head

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"krgimage/configs"
	"krgimage/pxe/nodes"
)

// loopback is a Network on 127.0.0.1 with ports of the system's choice.
type loopback struct {
	mu  sync.Mutex
	tcp map[int]net.Listener // by the port asked for; guarded by mu
	ra  func(context.Context) error
}

func (l *loopback) ListenTCP(port int) (net.Listener, error) {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tcp == nil {
		l.tcp = map[int]net.Listener{}
	}
	l.tcp[port] = listener
	return listener, err
}

func (l *loopback) ListenUDP(int) (net.PacketConn, error) {
	return net.ListenPacket("udp4", "127.0.0.1:0")
}

func (l *loopback) DialTCP(context.Context, netip.AddrPort) (net.Conn, error) {
	return nil, errors.New("no nodes here")
}

func (l *loopback) RouterAdvertisements(ctx context.Context) error {
	if l.ra != nil {
		return l.ra(ctx)
	}
	<-ctx.Done()
	return nil
}

// nfsFunc is a stand-in for the NFS server.
type nfsFunc func(ctx context.Context, l net.Listener) error

func (f nfsFunc) Serve(ctx context.Context, l net.Listener) error { return f(ctx, l) }

func untilDone(ctx context.Context, _ net.Listener) error {
	<-ctx.Done()
	return ctx.Err()
}

func image(t *testing.T) Image {
	t.Helper()
	dir := t.TempDir()
	for _, name := range append([]string{"vmlinuz", "initramfs.img"}, loaderNames...) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("content of "+name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return Image{Kernel: filepath.Join(dir, "vmlinuz"), Initramfs: filepath.Join(dir, "initramfs.img"), LoaderDir: dir}
}

func config(t *testing.T) Config {
	t.Helper()
	c := configs.Default()
	c.Network.Subnet = netip.MustParsePrefix("127.0.0.0/24")
	c.Network.Head = netip.MustParseAddr("127.0.0.254")
	return Config{Cluster: c, Image: image(t), StateDir: t.TempDir(), Network: &loopback{}, NFS: nfsFunc(untilDone)}
}

// run starts a head and returns when it serves.
func run(t *testing.T, cfg Config) (h *Head, stop func() error) {
	t.Helper()
	h, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- h.Run(ctx, func() { close(ready) }) }()
	stop = sync.OnceValue(func() error { cancel(); return <-ended })
	t.Cleanup(func() { stop() })
	select {
	case <-ready:
	case err := <-ended:
		ended <- err
		t.Fatalf("the head does not serve: %v", err)
	}
	return h, stop
}

func TestControl(t *testing.T) {
	for name, dir := range map[string]string{
		"short path": "s",
		"long path":  strings.Repeat("a-very-long-name/", 10),
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config(t)
			cfg.StateDir = filepath.Join(cfg.StateDir, dir)
			cfg.NFSStats = func() any { return map[string]int{"open": 3} }
			cfg.Metrics = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "metric 1\n") })
			if _, err := Dial(t.Context(), cfg.StateDir); !errors.Is(err, ErrNotRunning) {
				t.Fatalf("Dial before the start: %v", err)
			}
			h, stop := run(t, cfg)
			socket := filepath.Join(cfg.StateDir, "head", controlName)
			if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("control socket: %v %v", info, err)
			}
			c, err := Dial(t.Context(), cfg.StateDir)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			health, err := c.Health(t.Context())
			if err != nil || !health.OK || len(health.Services) != 10 || health.Services["nfs"] != "up" {
				t.Errorf("health %+v, %v", health, err)
			}
			var stats struct{ Open int }
			if err := c.NFS(t.Context(), &stats); err != nil || stats.Open != 3 {
				t.Errorf("file server's counters %+v, %v", stats, err)
			}
			var text strings.Builder
			if err := c.Metrics(t.Context(), &text); err != nil || text.String() != "metric 1\n" {
				t.Errorf("metrics %q, %v", text.String(), err)
			}

			const mac = configs.MAC("52:54:00:00:00:0a")
			if _, err := h.Nodes().Assign(mac); err != nil {
				t.Fatal(err)
			}
			all, err := c.Nodes(t.Context())
			if err != nil || len(all) != 1 || all[0].MAC != mac || all[0].Address != netip.MustParseAddr("127.0.0.1") {
				t.Errorf("nodes %+v, %v", all, err)
			}
			var seen []nodes.Stage
			for n, err := range c.Watch(t.Context()) {
				if err != nil {
					t.Fatal(err)
				}
				if seen = append(seen, n.Stage()); len(seen) == 2 {
					break
				}
				h.Nodes().Saw(mac, nodes.StageLoader, "")
			}
			if seen[0] != "" || seen[1] != nodes.StageLoader {
				t.Errorf("watched %q", seen)
			}

			watching, broken := make(chan struct{}), make(chan error, 1)
			go func() {
				var last error
				for _, err := range c.Watch(t.Context()) {
					if last = err; err == nil {
						close(watching)
					}
				}
				broken <- last
			}()
			<-watching
			if err := stop(); err != nil {
				t.Errorf("stop: %v", err)
			}
			if err := <-broken; !errors.Is(err, ErrNotRunning) {
				t.Errorf("a watch ends with %v", err)
			}
			if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the socket is left behind: %v", err)
			}
		})
	}
}

func TestSecondHead(t *testing.T) {
	cfg := config(t)
	run(t, cfg)
	if err := Run(t.Context(), cfg, nil); !errors.Is(err, ErrRunning) {
		t.Errorf("a second head: %v", err)
	}
	c, err := Dial(t.Context(), cfg.StateDir)
	if err != nil {
		t.Fatalf("the first one lost its socket: %v", err)
	}
	c.Close()
}

func TestSocketOfADeadHead(t *testing.T) {
	cfg := config(t)
	dir := filepath.Join(cfg.StateDir, "head")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, controlName), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	_, stop := run(t, cfg)
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestServiceThatFailsEndsTheHead(t *testing.T) {
	for name, tt := range map[string]struct {
		nfs  nfsFunc
		want string
	}{
		"error": {func(context.Context, net.Listener) error { return errors.New("root is gone") }, "nfs: root is gone"},
		"end":   {func(context.Context, net.Listener) error { return nil }, "nfs: ended by itself"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config(t)
			cfg.NFS = tt.nfs
			if err := Run(t.Context(), cfg, nil); err == nil || err.Error() != tt.want {
				t.Errorf("Run = %v, want %q", err, tt.want)
			}
		})
	}
}

func TestNoRouterAdvertisements(t *testing.T) {
	cfg := config(t)
	tried := make(chan struct{})
	cfg.Network = &loopback{ra: func(context.Context) error { close(tried); return errors.New("no privilege") }}
	_, stop := run(t, cfg)
	<-tried
	if err := stop(); err != nil {
		t.Errorf("the head minds: %v", err)
	}
}

func TestNFSOnlyForTheSubnet(t *testing.T) {
	cfg := config(t)
	network := cfg.Network.(*loopback)
	cfg.NFS = nfsFunc(func(ctx context.Context, l net.Listener) error {
		defer context.AfterFunc(ctx, func() { l.Close() })()
		for {
			conn, err := l.Accept()
			if err != nil {
				return ctx.Err()
			}
			conn.Write([]byte("hello"))
			conn.Close()
		}
	})
	run(t, cfg)
	network.mu.Lock()
	to := network.tcp[cfg.Cluster.Network.NFSPort].Addr().String()
	network.mu.Unlock()
	for from, want := range map[string]string{"127.0.0.7": "hello", "127.0.1.7": ""} {
		conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).Dial("tcp4", to)
		if err != nil {
			t.Fatal(err)
		}
		got, _ := io.ReadAll(conn)
		conn.Close()
		if string(got) != want {
			t.Errorf("%s gets %q, want %q", from, got, want)
		}
	}
}

func TestMissingImage(t *testing.T) {
	for _, tt := range []struct {
		name    string
		spoil   func(Image) error
		bios    string
		missing string // "": nothing is
	}{
		{"no kernel", func(i Image) error { return os.Remove(i.Kernel) }, "ipxe", "vmlinuz"},
		{"empty initramfs", func(i Image) error { return os.Truncate(i.Initramfs, 0) }, "ipxe", "initramfs.img"},
		{"no iPXE", func(i Image) error { return os.Remove(filepath.Join(i.LoaderDir, "undionly.kpxe")) }, "ipxe", "undionly.kpxe"},
		{"no pxelinux, none needed", func(i Image) error { return os.Remove(filepath.Join(i.LoaderDir, "pxelinux.0")) }, "ipxe", ""},
		{"no pxelinux", func(i Image) error { return os.Remove(filepath.Join(i.LoaderDir, "pxelinux.0")) }, "pxelinux", "pxelinux.0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := config(t)
			cfg.Cluster.Boot.BIOS = tt.bios
			if err := tt.spoil(cfg.Image); err != nil {
				t.Fatal(err)
			}
			_, err := New(cfg)
			if tt.missing == "" && err != nil {
				t.Errorf("New: %v", err)
			}
			if tt.missing != "" && (err == nil || !strings.Contains(err.Error(), tt.missing) || !strings.Contains(err.Error(), "krgimage build")) {
				t.Errorf("New: %v", err)
			}
		})
	}
}
