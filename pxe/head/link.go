package head

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"golang.org/x/sys/unix"

	"krgimage/configs"
	"krgimage/nfsroot/rpcbind"
	"krgimage/nfsroot/sunrpc"
	"krgimage/pxe/dhcp"
	"krgimage/pxe/ra"
)

// Link is the Network of a real interface.
type Link struct {
	ifi  *net.Interface
	addr netip.Addr    // the head's
	wait time.Duration // how long another DHCP server has to answer
	log  *slog.Logger
}

// OpenLink returns the interface that the boot network is on: network.interface,
// or else the one that holds network.head. It must exist, be up and hold the
// head's address; the error says what to do.
func OpenLink(c configs.Network, log *slog.Logger) (*Link, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	want := netip.PrefixFrom(c.Head, c.Subnet.Bits())
	all, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("network interfaces: %w", err)
	}
	var found *net.Interface
	var names []string
	for i := range all {
		if all[i].Flags&net.FlagLoopback == 0 {
			names = append(names, all[i].Name)
		}
		if all[i].Name == c.Interface || c.Interface == "" && holds(&all[i], c.Head) {
			found = &all[i]
			break
		}
	}
	switch {
	case found == nil && c.Interface == "":
		return nil, fmt.Errorf("no network interface holds the head's address %s. Give it to the one that leads to the nodes (there are: %s):\n  ip addr add %s dev INTERFACE",
			c.Head, strings.Join(names, ", "), want)
	case found == nil:
		return nil, fmt.Errorf("there is no network interface %s (network.interface); there are: %s", c.Interface, strings.Join(names, ", "))
	case found.Flags&net.FlagUp == 0:
		return nil, fmt.Errorf("network interface %s is down. Switch it on:\n  ip link set %s up", found.Name, found.Name)
	case !holds(found, c.Head):
		return nil, fmt.Errorf("network interface %s does not have the head's address. Add it:\n  ip addr add %s dev %s", found.Name, want, found.Name)
	}
	return &Link{found, c.Head, dhcp.ForeignWait, log.With("component", "link", "interface", found.Name)}, nil
}

func holds(ifi *net.Interface, a netip.Addr) bool {
	addrs, err := ifi.Addrs()
	if err != nil {
		return false
	}
	for _, have := range addrs {
		if p, err := netip.ParsePrefix(have.String()); err == nil && p.Addr().Unmap() == a {
			return true
		}
	}
	return false
}

// Name is the interface's name.
func (l *Link) Name() string { return l.ifi.Name }

// ListenTCP listens on the head's address. The socket is not bound to the
// interface, so that the services can be reached from the head itself.
func (l *Link) ListenTCP(port int) (net.Listener, error) {
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp4", netip.AddrPortFrom(l.addr, uint16(port)).String())
	if err != nil {
		return nil, l.explain("TCP", port, err)
	}
	return listener, nil
}

// DialTCP connects from the head's address: a node's kernel knows its file
// server by that.
func (l *Link) DialTCP(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return sunrpc.DialFrom(l.addr)(ctx, to)
}

// RegisterRPC enters programs, which listen on the head's address, in this
// machine's own rpcbind.
func (l *Link) RegisterRPC(ctx context.Context, entries []rpcbind.Entry) (unregister func(context.Context) error, err error) {
	return rpcbind.Register(ctx, l.addr, entries)
}

// ListenUDP listens for everything that comes in on the interface: broadcasts
// reach only a socket that is not bound to an address. Being bound to the
// interface it hears no other link, and its broadcasts go nowhere else. No
// SO_REUSEADDR: a second DHCP server on this machine must be an error.
func (l *Link) ListenUDP(port int) (net.PacketConn, error) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		if ctlErr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, l.ifi.Name)
			if err == nil {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
			}
		}); ctlErr != nil {
			return ctlErr
		}
		return err
	}}
	conn, err := config.ListenPacket(context.Background(), "udp4", fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		return nil, l.explain("UDP", port, err)
	}
	return conn, nil
}

// explain says what to do about a socket that could not be opened.
func (l *Link) explain(protocol string, port int, err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("%s port %d on %s is taken by another program. Find it with\n  ss -lnp 'sport = :%d'\nand stop it: %w", protocol, port, l.ifi.Name, port, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s port %d on %s needs a privilege (CAP_NET_BIND_SERVICE, and CAP_NET_RAW for the interface). Run the head node as root, with sudo: %w", protocol, port, l.ifi.Name, err)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("the address %s is not on this machine any more: %w", l.addr, err)
	}
	return fmt.Errorf("%s port %d on %s: %w", protocol, port, l.ifi.Name, err)
}

// RouterAdvertisements answers IPv6 router solicitations.
func (l *Link) RouterAdvertisements(ctx context.Context) error {
	if len(l.ifi.HardwareAddr) != 6 { // a link without Ethernet has no iPXE on it
		<-ctx.Done()
		return nil
	}
	listener, err := ra.Listen(l.ifi)
	if err != nil {
		return fmt.Errorf("iPXE will wait some 13 s for an IPv6 router on every boot: %w", err)
	}
	return listener.Serve(ctx, l.log)
}

// FindForeignDHCP looks for another DHCP server on the link.
func (l *Link) FindForeignDHCP(ctx context.Context, own netip.Addr) error {
	// A packet socket: it hears an offer whatever address the interface has, and
	// takes no port from a DHCP client that may run here.
	conn, err := nclient4.NewRawUDPConn(l.ifi.Name, dhcpv4.ClientPort)
	if err != nil {
		return fmt.Errorf("look for another DHCP server on %s (needs CAP_NET_RAW: run as root): %w", l.ifi.Name, err)
	}
	defer conn.Close()
	return dhcp.FindForeign(ctx, conn, l.ifi.Name, own, l.wait)
}
