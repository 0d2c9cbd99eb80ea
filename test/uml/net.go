package uml

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Net is a network namespace with a bridge that guests are plugged into. The
// machine's end of it, where servers listen, is Addr.
type Net struct {
	Addr   netip.Addr
	calls  chan func()
	guests int
}

const (
	bridge    = "br0"
	prefixLen = 24
)

// NewNet makes the namespace. It goes with the test.
func NewNet(t testing.TB) *Net {
	t.Helper()
	n := &Net{Addr: netip.MustParseAddr("10.79.0.254"), calls: make(chan func())}
	ready := make(chan error)
	go n.thread(ready)
	if err := <-ready; err != nil {
		t.Fatalf("network namespace for User-Mode Linux: %v", err)
	}
	t.Cleanup(func() { close(n.calls) })
	return n
}

// thread is the one in the namespace. It is never given back to the runtime:
// with its end, and that of the processes and sockets made on it, the namespace
// is gone.
func (n *Net) thread(ready chan<- error) {
	runtime.LockOSThread()
	err := unix.Unshare(unix.CLONE_NEWNET)
	if err == nil {
		err = n.setUp()
	}
	ready <- err
	if err != nil {
		return
	}
	for f := range n.calls {
		f()
	}
}

func (n *Net) setUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridge}}
	if err := netlink.LinkAdd(br); err != nil {
		return fmt.Errorf("bridge: %w", err)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: n.Addr.AsSlice(), Mask: net.CIDRMask(prefixLen, 32)}}
	if err := netlink.AddrAdd(br, addr); err != nil {
		return err
	}
	return netlink.LinkSetUp(br)
}

// Do runs f in the namespace: sockets that it opens and processes that it
// starts belong there.
func (n *Net) Do(f func() error) error {
	done := make(chan error)
	n.calls <- func() { done <- f() }
	return <-done
}

// Listen opens a TCP port of the machine's end. Port 0 picks one.
func (n *Net) Listen(t testing.TB, port int) net.Listener {
	t.Helper()
	var l net.Listener
	err := n.Do(func() (err error) {
		l, err = net.Listen("tcp4", netip.AddrPortFrom(n.Addr, uint16(port)).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// Dial connects to an address in the namespace.
func (n *Net) Dial(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	var c net.Conn
	err := n.Do(func() (err error) {
		c, err = (&net.Dialer{}).DialContext(ctx, "tcp4", addr.String())
		return err
	})
	return c, err
}

// plug makes a tap for one more guest and gives the guest's address.
func (n *Net) plug() (tap string, addr netip.Addr, err error) {
	err = n.Do(func() error {
		n.guests++
		tap = fmt.Sprintf("tap%d", n.guests)
		a := n.Addr.As4()
		a[3] = byte(n.guests)
		addr = netip.AddrFrom4(a)
		br, err := netlink.LinkByName(bridge)
		if err != nil {
			return err
		}
		link := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: tap}, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR}
		if err := netlink.LinkAdd(link); err != nil {
			return fmt.Errorf("tap: %w", err)
		}
		if err := netlink.LinkSetMaster(link, br); err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	})
	return tap, addr, err
}
