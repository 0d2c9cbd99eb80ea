package vnet

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

func TestReadFrame(t *testing.T) {
	tests := []struct {
		name string
		in   []byte
		want []byte
		err  error
	}{
		{"one", []byte("\x00\x00\x00\x03abcrest"), []byte("abc"), nil},
		{"empty frame", []byte("\x00\x00\x00\x00"), []byte{}, nil},
		{"end", nil, nil, io.EOF},
		{"cut in the length", []byte("\x00\x00"), nil, io.ErrUnexpectedEOF},
		{"cut before the frame", []byte("\x00\x00\x00\x03"), nil, io.ErrUnexpectedEOF},
		{"cut in the frame", []byte("\x00\x00\x00\x03ab"), nil, io.ErrUnexpectedEOF},
		{"too long", []byte("\x00\x00\x24\x01"), nil, errFraming},
		{"nonsense", []byte("GET / HTTP/1.1\r\n"), nil, errFraming},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := readFrame(bytes.NewReader(tt.in))
			if !errors.Is(err, tt.err) || !bytes.Equal(got, tt.want) {
				t.Errorf("got %q, %v; want %q, %v", got, err, tt.want, tt.err)
			}
		})
	}
}

// FuzzStream feeds a port with any bytes: nothing may crash, what comes out on
// the other side is what whole frames went in, and a frame survives the way
// out and in again.
func FuzzStream(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("\x00\x00\x00\x00"))
	f.Add(append([]byte{0, 0, 0, 16}, frame(macB, macA, "hi")...))
	f.Add([]byte("\xff\xff\xff\xff"))
	f.Add([]byte("\x00\x00\x00\x05short\x00\x00\x24\x01"))
	f.Fuzz(func(t *testing.T, in []byte) {
		sw := NewSwitch(1 + len(in)/4)
		a, _ := sw.Attach("a")
		b, _ := sw.Attach("b")
		r := bufio.NewReader(bytes.NewReader(in))
		var sent uint64
		for {
			fr, err := readFrame(r)
			if err != nil {
				break
			}
			a.Send(fr)
			sent++
		}
		st := a.Stats()
		if st.RxFrames+st.Malformed != sent {
			t.Fatalf("%d frames read, %d taken, %d malformed", sent, st.RxFrames, st.Malformed)
		}
		var buf bytes.Buffer
		w := bufio.NewWriter(&buf)
		var out [][]byte
		for len(b.out) > 0 {
			fr := <-b.out
			out = append(out, fr)
			if err := writeFrame(w, fr); err != nil {
				t.Fatal(err)
			}
		}
		w.Flush()
		for i, want := range out {
			got, err := readFrame(&buf)
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("frame %d: %x, %v; want %x", i, got, err, want)
			}
		}
	})
}

func newNetwork(t *testing.T, cfg Config) *Network {
	t.Helper()
	cfg.Head = netip.MustParsePrefix("10.77.0.254/24")
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func dialPort(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func sendFrame(t *testing.T, c net.Conn, f []byte) {
	t.Helper()
	if _, err := c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(f))), f...)); err != nil {
		t.Fatal(err)
	}
}

// TestPlug speaks QEMU's side of two ports.
func TestPlug(t *testing.T) {
	n := newNetwork(t, Config{Dir: t.TempDir()})
	pathA, err := n.Plug("node1")
	if err != nil {
		t.Fatal(err)
	}
	pathB, err := n.Plug("node2")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := n.Plug("node1"); err != nil || again != pathA {
		t.Errorf("second Plug: %q, %v; want %q", again, err, pathA)
	}
	a, b := dialPort(t, pathA), dialPort(t, pathB)

	// A frame sent before B is connected is lost, as on any cable: announce B
	// until A hears it.
	ready := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			sendFrame(t, b, frame(all, macB, "here"))
			select {
			case <-ready:
				return
			default:
			}
		}
	}()
	if _, err := readFrame(a); err != nil {
		t.Fatal(err)
	}
	close(ready)
	<-done
	want := frame(macB, macA, "to b")
	sendFrame(t, a, want)
	for {
		got, err := readFrame(b)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(got, want) {
			break
		}
	}

	// A stream out of step is cut, counted, and the port takes a new guest.
	if _, err := a.Write([]byte("\xff\xff\xff\xff")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, a); err != nil {
		t.Fatal(err)
	}
	if got := n.Port("node1").Stats().Malformed; got != 1 {
		t.Errorf("malformed: %d, want 1", got)
	}
	a = dialPort(t, pathA)
	want = frame(macB, macA, "again")
	sendFrame(t, a, want)
	for {
		got, err := readFrame(b)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(got, want) {
			break
		}
	}

	n.Close()
	if _, err := os.Stat(pathA); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there after Close: %v", err)
	}
}

func TestSocketDirectory(t *testing.T) {
	runtime := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", runtime)
	long := filepath.Join(t.TempDir(), strings.Repeat("long", 25))
	n := newNetwork(t, Config{Dir: long})
	path, err := n.Plug("node1")
	if err != nil {
		t.Fatal(err)
	}
	if len(path) > maxSocketPath || strings.HasPrefix(path, long) {
		t.Errorf("socket at %s", path)
	}
	n.Close()
	if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the private directory is still there: %v", err)
	}
	if _, err := n.Plug("../x"); err == nil {
		t.Error("a port name with a slash was accepted")
	}
	if _, err := New(Config{}); err == nil {
		t.Error("a network without a head address was made")
	}
}

// solicitation is what iPXE sends after DHCP: RFC 4861 §4.1 from the
// unspecified address, without options.
func solicitation(t *testing.T) []byte {
	f, err := hex.DecodeString("333300000002" + "52540000000a" + "86dd" +
		"6000000000083aff" + "00000000000000000000000000000000" + "ff020000000000000000000000000002" +
		"85007bb800000000")
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestRouterAdvertisements(t *testing.T) {
	n := newNetwork(t, Config{})
	guest, err := n.Attach("guest")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- n.RouterAdvertisements(ctx) }()
	var got []byte
	for got == nil {
		guest.Send(frame(multi, macA, "other"))
		guest.Send(solicitation(t))
		select {
		case got = <-guest.out:
		case err := <-done:
			t.Fatalf("the responder ended: %v", err)
		default:
			runtime.Gosched()
		}
	}
	if !bytes.HasPrefix(got, frame(multi, address(defaultMAC), "")[:12]) || got[54] != 134 {
		t.Fatalf("answer % x is no router advertisement of the head to all nodes", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n.Port("router") != nil {
		t.Error("the responder left its port behind")
	}
}
