package tftp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	client "github.com/pin/tftp/v3"

	"krgimage/configs"
	"krgimage/pxe/nodes"
)

// foreign hides that a connection is a socket of the host, as one of a virtual
// network is.
type foreign struct{ net.PacketConn }

var content = bytes.Repeat([]byte("0123456789abcdef"), 20_000) // 320 kB: 218 blocks of 1468

func table(t *testing.T) *Table {
	t.Helper()
	path := filepath.Join(t.TempDir(), "undionly.kpxe")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return &Table{
		Files: map[string]File{
			"undionly.kpxe": {Path: path, Stage: nodes.StageLoader},
			"empty":         {Data: []byte{}},
			"gone":          {Path: path + ".gone"},
			"dir":           {Path: t.TempDir()},
		},
		PXELinux: func(mac configs.MAC) ([]byte, bool) { return []byte("for " + mac), mac == "52:54:00:00:00:0a" },
		PXELinuxDefault: func(a netip.Addr) ([]byte, bool) {
			return []byte("for " + a.String()), a == netip.MustParseAddr("127.0.0.1")
		},
	}
}

// start runs a server; the returned channel has the complete transfers.
func start(t *testing.T, wrap func(net.PacketConn) net.PacketConn) (addr string, done chan Transfer) {
	t.Helper()
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done = make(chan Transfer, 100)
	s := New(Config{
		Lookup: table(t).Lookup,
		Allow:  func(a netip.Addr) bool { return a == netip.MustParseAddr("127.0.0.1") },
		Done:   func(tr Transfer) { done <- tr },
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, wrap(conn)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return conn.LocalAddr().String(), done
}

var networks = map[string]func(net.PacketConn) net.PacketConn{
	"host":    func(c net.PacketConn) net.PacketConn { return c },
	"bridged": func(c net.PacketConn) net.PacketConn { return foreign{c} },
}

func get(t *testing.T, addr, name string, blockSize int) ([]byte, error) {
	t.Helper()
	c, err := client.NewClient(addr)
	if err != nil {
		t.Fatal(err)
	}
	c.SetTimeout(5 * time.Second)
	c.RequestTSize(true)
	if blockSize != 0 {
		c.SetBlockSize(blockSize)
	}
	from, err := c.Receive(name, "octet")
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	_, err = from.WriteTo(&b)
	return b.Bytes(), err
}

func TestTransfer(t *testing.T) {
	for network, wrap := range networks {
		t.Run(network, func(t *testing.T) {
			addr, done := start(t, wrap)
			for _, tt := range []struct {
				name  string
				block int
				want  string // content; "error: text" for a refusal
			}{
				{"undionly.kpxe", 0, string(content)},
				{"undionly.kpxe", 1468, string(content)},
				{"/undionly.kpxe", 1408, string(content)},
				{`\undionly.kpxe`, 8192, string(content)},
				{"empty", 0, ""},
				{"pxelinux.cfg/01-52-54-00-00-00-0a", 0, "for 52:54:00:00:00:0a"},
				{"pxelinux.cfg/default", 0, "for 127.0.0.1"},
				{"pxelinux.cfg/01-52-54-00-00-00-0b", 0, "error: not found"},
				{"pxelinux.cfg/7F000001", 0, "error: not found"},
				{"gone", 0, "error: not found"},
				{"dir", 0, "error: not found"},
				{"../undionly.kpxe", 0, "error: not found"},
				{"/etc/passwd", 0, "error: not found"},
				{"", 0, "error: not found"},
			} {
				got, err := get(t, addr, tt.name, tt.block)
				if text, refused := strings.CutPrefix(tt.want, "error: "); refused {
					if err == nil || !strings.Contains(err.Error(), text) {
						t.Errorf("%q: %d bytes, %v", tt.name, len(got), err)
					}
					continue
				}
				if err != nil || string(got) != tt.want {
					t.Errorf("%q: %d bytes, %v", tt.name, len(got), err)
					continue
				}
				tr := <-done
				if tr.Client != netip.MustParseAddr("127.0.0.1") || tr.Name != Name(tt.name) || tr.Bytes != int64(len(tt.want)) {
					t.Errorf("noted %+v", tr)
				}
				if (tr.Stage == nodes.StageLoader) != (tr.Name == "undionly.kpxe") {
					t.Errorf("%s has the stage %q", tr.Name, tr.Stage)
				}
			}
		})
	}
}

func TestManyAtOnce(t *testing.T) {
	for network, wrap := range networks {
		t.Run(network, func(t *testing.T) {
			addr, _ := start(t, wrap)
			var group sync.WaitGroup
			for range 20 {
				group.Go(func() {
					if got, err := get(t, addr, "undionly.kpxe", 1468); err != nil || !bytes.Equal(got, content) {
						t.Errorf("%d bytes, %v", len(got), err)
					}
				})
			}
			group.Wait()
		})
	}
}

func TestWritingIsRefused(t *testing.T) {
	addr, _ := start(t, networks["host"])
	c, err := client.NewClient(addr)
	if err != nil {
		t.Fatal(err)
	}
	c.SetTimeout(5 * time.Second)
	if out, err := c.Send("undionly.kpxe", "octet"); err == nil {
		if _, err := out.ReadFrom(strings.NewReader("x")); err == nil {
			t.Error("a file was taken")
		}
	}
}

// ask sends raw packets and returns what comes back.
func ask(t *testing.T, conn net.PacketConn, to string, packet string) (string, net.Addr) {
	t.Helper()
	udp, err := net.ResolveUDPAddr("udp4", to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.WriteTo([]byte(packet), udp); err != nil {
		t.Fatal(err)
	}
	return read(t, conn)
}

func read(t *testing.T, conn net.PacketConn) (string, net.Addr) {
	t.Helper()
	buf := make([]byte, 2048)
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	n, from, err := conn.ReadFrom(buf)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	return string(buf[:n]), from
}

// Firmware asks for the size, breaks off, and asks again from the same port.
func TestSizeFirst(t *testing.T) {
	for network, wrap := range networks {
		t.Run(network, func(t *testing.T) {
			addr, done := start(t, wrap)
			conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			answer, from := ask(t, conn, addr, "\x00\x01undionly.kpxe\x00octet\x00tsize\x000\x00")
			if want := "\x00\x06tsize\x00320000\x00"; answer != want {
				t.Fatalf("answer %q, want %q", answer, want)
			}
			if _, err := conn.WriteTo([]byte("\x00\x05\x00\x08thanks\x00"), from); err != nil {
				t.Fatal(err)
			}
			old := from.String()
			answer, from = ask(t, conn, addr, "\x00\x01empty\x00octet\x00")
			for from.String() == old && old != addr { // the end of the first transfer, from its own port
				answer, from = read(t, conn)
			}
			if answer != "\x00\x03\x00\x01" {
				t.Fatalf("answer %q", answer)
			}
			if _, err := conn.WriteTo([]byte("\x00\x04\x00\x01"), from); err != nil {
				t.Fatal(err)
			}
			if tr := <-done; tr.Name != "empty" {
				t.Errorf("noted %+v: a transfer that was broken off counts", tr)
			}
		})
	}
}

func TestGarbageDoesNoHarm(t *testing.T) {
	for network, wrap := range networks {
		t.Run(network, func(t *testing.T) {
			addr, _ := start(t, wrap)
			conn, err := net.Dial("udp4", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			for _, p := range []string{"", "\x00", "\x00\x01", "\x00\x01ab", "\x00\x04\x00\x01", "\x00\x03\x00\x01x", "\x00\x05\x00\x00x",
				"\x00\x06blk", "\xff\xff\xff\xff", "\x00\x01\x00\x00", "\x00\x02x\x00octet\x00", strings.Repeat("\x00\x01", 700),
				"\x00\x01empty\x00octet\x00blksize\x00-1\x00tsize\x00" + strings.Repeat("9", 470) + "\x00"} {
				conn.Write([]byte(p))
			}
			if got, err := get(t, addr, "undionly.kpxe", 1468); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
}

func TestStopEndsTransfers(t *testing.T) {
	for network, wrap := range networks {
		t.Run(network, func(t *testing.T) {
			front, err := net.ListenPacket("udp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ended := make(chan error, 1)
			go func() { ended <- New(Config{Lookup: table(t).Lookup}).Serve(ctx, wrap(front)) }()
			conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ask(t, conn, front.LocalAddr().String(), "\x00\x01undionly.kpxe\x00octet\x00") // and never acknowledges
			cancel()
			select {
			case err := <-ended:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(30 * time.Second):
				t.Fatal("does not stop")
			}
		})
	}
}

func TestLostNetworkIsAnError(t *testing.T) {
	front, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	front.Close()
	if err := New(Config{Lookup: table(t).Lookup}).Serve(t.Context(), foreign{front}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve = %v", err)
	}
}

func FuzzLookup(f *testing.F) {
	for _, s := range []string{"undionly.kpxe", "/pxelinux.cfg/01-52-54-00-00-00-0a", `\..\x`, "pxelinux.cfg/default", "//vmlinuz", "pxelinux.cfg/01-52:54:00:00:00:0a"} {
		f.Add(s)
	}
	secret := filepath.Join(f.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		f.Fatal(err)
	}
	names := map[string]File{"undionly.kpxe": {Data: []byte("loader")}, "vmlinuz": {Data: []byte("kernel")}}
	t := &Table{Files: names,
		PXELinux: func(mac configs.MAC) ([]byte, bool) { return []byte(mac), true },
	}
	f.Fuzz(func(tt *testing.T, asked string) {
		name := Name(asked)
		file, ok := t.Lookup(name, netip.Addr{})
		if !ok {
			return
		}
		if file.Path != "" {
			tt.Errorf("%q leads to the path %s", asked, file.Path)
		}
		if _, static := names[name]; !static {
			if hw := configs.MAC(file.Data).HardwareAddr(); len(hw) != 6 || hw.String() != string(file.Data) {
				tt.Errorf("%q is the configuration of %q", asked, file.Data)
			}
		}
		if body, size, err := file.open(); err != nil {
			tt.Error(err)
		} else if n, _ := io.Copy(io.Discard, body); n != size {
			tt.Errorf("%q: %d bytes of %d", asked, n, size)
		}
	})
}
