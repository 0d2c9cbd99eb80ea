package vnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	nic        = 1
	mtu        = 1500
	linkQueue  = 4096    // frames between the stack and the switch
	maxSegment = 4 << 20 // bytes of a TCP buffer; NFS reads and writes are 1 MiB
	udpBuffer  = 1 << 20 // bytes
)

// Host is a machine on the switch that lives in this process: an IPv4 stack
// with one address. The head node is one; tests use more as guests.
type Host struct {
	port  *Port
	addr  netip.Prefix
	mac   net.HardwareAddr
	stack *stack.Stack
	link  *channel.Endpoint

	cancel  context.CancelFunc
	group   *errgroup.Group
	closing sync.Once
}

// NewHost puts a machine with that address on the port. It answers ARP and
// ping at once.
func NewHost(port *Port, mac net.HardwareAddr, addr netip.Prefix) (*Host, error) {
	if len(mac) != 6 || mac[0]&1 != 0 {
		return nil, fmt.Errorf("virtual network: %q is not the Ethernet address of a machine", mac)
	}
	link := channel.New(linkQueue, mtu+headerSize, tcpip.LinkAddress(mac))
	// Frames pass through memory only: there is nothing a checksum could find.
	link.LinkEPCapabilities = stack.CapabilityRXChecksumOffload
	h := &Host{
		port: port,
		addr: addr,
		mac:  mac,
		link: link,
		stack: stack.New(stack.Options{
			NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
			TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
			HandleLocal:        true, // the head may call its own servers
		}),
	}
	if err := h.configure(); err != nil {
		h.stack.Close()
		return nil, fmt.Errorf("virtual network: set up the TCP/IP stack of %s: %w", addr, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = cancel
	h.group, ctx = errgroup.WithContext(ctx)
	h.group.Go(func() error { return h.receive(ctx) })
	h.group.Go(func() error { return h.transmit(ctx) })
	return h, nil
}

func (h *Host) configure() error {
	sack := tcpip.TCPSACKEnabled(true)
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: 1 << 20, Max: maxSegment}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: 1 << 20, Max: maxSegment}
	for _, opt := range []tcpip.SettableTransportProtocolOption{&sack, &moderate, &receive, &send} {
		if err := h.stack.SetTransportProtocolOption(tcp.ProtocolNumber, opt); err != nil {
			return tcpipError(err)
		}
	}
	if err := h.stack.CreateNIC(nic, ethernet.New(h.link)); err != nil {
		return tcpipError(err)
	}
	err := h.stack.AddProtocolAddress(nic, tcpip.ProtocolAddress{
		Protocol: ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{
			Address:   tcpip.AddrFrom4(h.addr.Addr().As4()),
			PrefixLen: h.addr.Bits(),
		},
	}, stack.AddressProperties{})
	if err != nil {
		return tcpipError(err)
	}
	// Everything is on the link: there is no router, but 255.255.255.255 and
	// the subnet's own addresses need a route alike.
	h.stack.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nic}})
	return nil
}

// receive feeds frames from the switch to the stack.
func (h *Host) receive(ctx context.Context) error {
	for {
		frame, err := h.port.Receive(ctx)
		if err != nil {
			return nil
		}
		// NewPacketBuffer copies: the stack may write to its packets, and the
		// frame is shared.
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
		h.link.InjectInbound(0, pkt)
		pkt.DecRef()
	}
}

// transmit feeds frames from the stack to the switch.
func (h *Host) transmit(ctx context.Context) error {
	for {
		pkt := h.link.ReadContext(ctx)
		if pkt == nil {
			return nil
		}
		frame := make([]byte, 0, pkt.Size())
		for _, part := range pkt.AsSlices() {
			frame = append(frame, part...)
		}
		pkt.DecRef()
		h.port.Send(frame)
	}
}

// Addr is the host's address with its prefix length.
func (h *Host) Addr() netip.Prefix { return h.addr }

// HardwareAddr is the host's Ethernet address.
func (h *Host) HardwareAddr() net.HardwareAddr { return h.mac }

// ListenTCP listens on a TCP port of the host.
func (h *Host) ListenTCP(port int) (net.Listener, error) {
	local, err := h.local(port)
	if err != nil {
		return nil, err
	}
	var queue waiter.Queue
	ep, tcpErr := h.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &queue)
	if tcpErr == nil {
		// As package net does: connections that linger don't hold the port.
		ep.SocketOptions().SetReuseAddress(true)
		if tcpErr = ep.Bind(local); tcpErr == nil {
			tcpErr = ep.Listen(listenBacklog)
		}
		if tcpErr != nil {
			ep.Close()
		}
	}
	if tcpErr != nil {
		return nil, fmt.Errorf("virtual network: listen on TCP port %d of %s: %s", port, h.addr.Addr(), tcpErr)
	}
	return &listener{TCPListener: gonet.NewTCPListener(h.stack, &queue, ep)}, nil
}

// listenBacklog is how many connections wait to be accepted: a cluster's nodes
// may all come at once.
const listenBacklog = 256

// ListenUDP opens a UDP socket on a port of the host, or on a free one for
// port 0. It receives what is sent to the host and to the broadcast address,
// and may send to the broadcast address.
func (h *Host) ListenUDP(port int) (net.PacketConn, error) {
	local, err := h.local(port)
	if err != nil {
		return nil, err
	}
	// A socket bound to the host's address would not see broadcasts.
	local.Addr = tcpip.Address{}
	var wq waiter.Queue
	ep, terr := h.stack.NewEndpoint(udp.ProtocolNumber, ipv4.ProtocolNumber, &wq)
	if terr != nil {
		return nil, fmt.Errorf("virtual network: open a UDP socket: %w", tcpipError(terr))
	}
	ep.SocketOptions().SetBroadcast(true)
	ep.SocketOptions().SetReceiveBufferSize(udpBuffer, true)
	if terr := ep.Bind(local); terr != nil {
		ep.Close()
		return nil, fmt.Errorf("virtual network: listen on UDP port %d of %s: %w", port, h.addr.Addr(), tcpipError(terr))
	}
	return &packetConn{UDPConn: gonet.NewUDPConn(&wq, ep), host: h.addr.Addr()}, nil
}

// DialTCP connects to another machine on the network.
func (h *Host) DialTCP(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	if !addr.Addr().Is4() {
		return nil, fmt.Errorf("virtual network: connect to %s: not an IPv4 address", addr)
	}
	c, err := gonet.DialContextTCP(ctx, h.stack, tcpip.FullAddress{
		NIC: nic, Addr: tcpip.AddrFrom4(addr.Addr().As4()), Port: addr.Port(),
	}, ipv4.ProtocolNumber)
	if err != nil {
		return nil, fmt.Errorf("virtual network: connect to %s: %w", addr, err)
	}
	return c, nil
}

// Close takes the host off the network. Its connections break without a word,
// as when a machine loses power.
func (h *Host) Close() error {
	h.closing.Do(func() {
		h.cancel()
		h.group.Wait()
		h.stack.Close()
		h.link.Close()
	})
	return nil
}

func (h *Host) local(port int) (tcpip.FullAddress, error) {
	if port < 0 || port > 65535 {
		return tcpip.FullAddress{}, fmt.Errorf("virtual network: %d is not a port", port)
	}
	return tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(h.addr.Addr().As4()), Port: uint16(port)}, nil
}

// listener makes a gonet listener behave like one of package net: Close ends
// Accept, which then returns net.ErrClosed.
type listener struct {
	*gonet.TCPListener
	closed atomic.Bool
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.TCPListener.Accept()
	if err != nil && l.closed.Load() {
		return nil, net.ErrClosed
	}
	return c, err
}

func (l *listener) Close() error {
	if l.closed.Swap(true) {
		return net.ErrClosed
	}
	l.TCPListener.Shutdown()
	return l.TCPListener.Close()
}

// packetConn makes a gonet UDP socket behave like one of package net.
type packetConn struct {
	*gonet.UDPConn
	host   netip.Addr
	closed atomic.Bool
}

func (c *packetConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, addr, err := c.UDPConn.ReadFrom(b)
	if err != nil && c.closed.Load() {
		err = net.ErrClosed
	}
	return n, addr, err
}

func (c *packetConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	to, ok := addr.(*net.UDPAddr)
	if !ok {
		return 0, fmt.Errorf("virtual network: %v is not a UDP address", addr)
	}
	// net keeps IPv4 addresses in 16 bytes, which netstack takes for IPv6.
	ip := to.IP.To4()
	if ip == nil {
		return 0, fmt.Errorf("virtual network: send to %v: not an IPv4 address", addr)
	}
	if c.closed.Load() {
		return 0, net.ErrClosed
	}
	return c.UDPConn.WriteTo(b, &net.UDPAddr{IP: ip, Port: to.Port})
}

// LocalAddr names the host, where the bare socket would say nothing at all
// because it is bound to every address.
func (c *packetConn) LocalAddr() net.Addr {
	a, _ := c.UDPConn.LocalAddr().(*net.UDPAddr)
	if a == nil {
		a = &net.UDPAddr{}
	}
	return &net.UDPAddr{IP: c.host.AsSlice(), Port: a.Port}
}

func (c *packetConn) Close() error {
	if c.closed.Swap(true) {
		return net.ErrClosed
	}
	return c.UDPConn.Close()
}

func tcpipError(err tcpip.Error) error { return errors.New(err.String()) }
