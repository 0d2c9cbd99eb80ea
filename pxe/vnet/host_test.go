package vnet

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"
)

func newGuest(t *testing.T, n *Network, last byte) *Host {
	t.Helper()
	mac := net.HardwareAddr{0x52, 0x54, 0, 0, 1, last}
	port, err := n.Attach(mac.String())
	if err != nil {
		t.Fatal(err)
	}
	h, err := NewHost(port, mac, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 0, last}), 24))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

// TestTCP moves some megabytes both ways between the head and a guest, and
// from guest to guest.
func TestTCP(t *testing.T) {
	n := newNetwork(t, Config{})
	a, b := newGuest(t, n, 1), newGuest(t, n, 2)
	data := make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	tests := []struct {
		name   string
		server *Host
		dial   func(context.Context, netip.AddrPort) (net.Conn, error)
	}{
		{"guest to head", n.Head(), a.DialTCP},
		{"head to guest", b, n.DialTCP},
		{"guest to guest", a, b.DialTCP},
		{"head to itself", n.Head(), n.DialTCP},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l, err := tt.server.ListenTCP(2222)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				io.Copy(c, c)
			}()
			c, err := tt.dial(t.Context(), netip.AddrPortFrom(tt.server.Addr().Addr(), 2222))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			go func() {
				c.Write(data)
				c.(interface{ CloseWrite() error }).CloseWrite()
			}()
			sum := sha256.New()
			if n, err := io.Copy(sum, c); err != nil || n != int64(len(data)) {
				t.Fatalf("%d of %d bytes came back: %v", n, len(data), err)
			}
			if want := sha256.Sum256(data); !bytes.Equal(sum.Sum(nil), want[:]) {
				t.Error("other bytes came back")
			}
		})
	}
}

func TestHTTP(t *testing.T) {
	n := newNetwork(t, Config{})
	guest := newGuest(t, n, 1)
	l, err := n.ListenTCP(80)
	if err != nil {
		t.Fatal(err)
	}
	from := make(chan string, 1)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from <- r.RemoteAddr
		io.WriteString(w, "#!ipxe\n")
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
		return guest.DialTCP(ctx, netip.MustParseAddrPort(addr))
	}}}
	resp, err := client.Get("http://10.77.0.254:80/boot.ipxe")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if string(body) != "#!ipxe\n" {
		t.Errorf("body %q", body)
	}
	// The head tells nodes apart by this address.
	if addr := netip.MustParseAddrPort(<-from); addr.Addr() != guest.Addr().Addr() {
		t.Errorf("request seen from %s, want %s", addr, guest.Addr())
	}
	srv.Close()
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("Serve returned %v", err)
	}
}

// TestUDPBroadcast does what DHCP does: a client without an address of its own
// is answered by broadcast, seen from the same port.
func TestUDPBroadcast(t *testing.T) {
	n := newNetwork(t, Config{})
	guest := newGuest(t, n, 1)
	server, err := n.ListenUDP(67)
	if err != nil {
		t.Fatal(err)
	}
	client, err := guest.ListenUDP(68)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.WriteTo([]byte("discover"), &net.UDPAddr{IP: net.IPv4bcast, Port: 67}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	k, from, err := server.ReadFrom(buf)
	if err != nil || string(buf[:k]) != "discover" || from.String() != "10.77.0.1:68" {
		t.Fatalf("server got %q from %v, %v", buf[:k], from, err)
	}
	if _, err := server.WriteTo([]byte("offer"), &net.UDPAddr{IP: net.IPv4bcast, Port: 68}); err != nil {
		t.Fatal(err)
	}
	k, from, err = client.ReadFrom(buf)
	if err != nil || string(buf[:k]) != "offer" || from.String() != "10.77.0.254:67" {
		t.Fatalf("client got %q from %v, %v", buf[:k], from, err)
	}
	if got := server.LocalAddr().String(); got != "10.77.0.254:67" {
		t.Errorf("local address %s", got)
	}
}

func TestPortTaken(t *testing.T) {
	n := newNetwork(t, Config{})
	l, err := n.ListenTCP(80)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.ListenTCP(80); err == nil {
		t.Error("a TCP port was given twice")
	}
	l.Close()
	c, err := n.ListenUDP(69)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.ListenUDP(69); err == nil {
		t.Error("a UDP port was given twice")
	}
	c.Close()
	if c, err = n.ListenUDP(69); err != nil {
		t.Errorf("a closed UDP port is not free: %v", err)
	} else {
		c.Close()
	}
	if _, err := n.ListenTCP(65536); err == nil {
		t.Error("port 65536 was accepted")
	}
}

// TestClose: what waits is released with net.ErrClosed.
func TestClose(t *testing.T) {
	n := newNetwork(t, Config{})
	l, err := n.ListenTCP(80)
	if err != nil {
		t.Fatal(err)
	}
	c, err := n.ListenUDP(69)
	if err != nil {
		t.Fatal(err)
	}
	errs := make(chan error, 2)
	go func() { _, err := l.Accept(); errs <- err }()
	go func() { _, _, err := c.ReadFrom(make([]byte, 1)); errs <- err }()
	l.Close()
	c.Close()
	for range 2 {
		if err := <-errs; !errors.Is(err, net.ErrClosed) {
			t.Errorf("got %v, want net.ErrClosed", err)
		}
	}
	if _, err := c.WriteTo(nil, &net.UDPAddr{IP: net.IPv4bcast, Port: 1}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write: %v, want net.ErrClosed", err)
	}
	n.Close()
	if _, err := n.Attach("late"); err == nil {
		t.Error("a closed network took a port")
	}
}

func TestDialNobody(t *testing.T) {
	n := newNetwork(t, Config{})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := n.DialTCP(ctx, netip.MustParseAddrPort("10.77.0.9:2222")); err == nil {
		t.Error("connected to nobody")
	}
	newGuest(t, n, 1)
	if _, err := n.DialTCP(t.Context(), netip.MustParseAddrPort("10.77.0.1:2222")); err == nil {
		t.Error("connected to a closed port")
	}
}
