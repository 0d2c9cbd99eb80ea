// Package lease gets a node its address and keeps it.
//
// Stage 1 calls Acquire until it has a lease and Apply to put it on the
// interface; PID 1 runs Keep, which renews at T1 and rebinds at T2 (RFC 2131,
// section 4.4.5). Unlike an ordinary DHCP client Keep never gives the address
// up: the node's root hangs on it, and a head that is away for a day must find
// the node as it was.
package lease

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/insomniacslk/dhcp/iana"
)

// OptionHeadURL carries the head's URL as ASCII. 224 is the first of the
// site-specific options (RFC 3942).
const OptionHeadURL = dhcpv4.GenericOptionCode(224)

// Lease is what DHCP gave.
type Lease struct {
	Interface string       `json:"interface"`
	MAC       string       `json:"mac"`
	Address   netip.Prefix `json:"address"` // the host's address with the subnet's length
	Router    netip.Addr   `json:"router,omitzero"`
	DNS       []netip.Addr `json:"dns,omitempty"`
	Server    netip.Addr   `json:"server"`               // DHCP server identifier
	Next      netip.Addr   `json:"next_server,omitzero"` // siaddr
	RootPath  string       `json:"root_path,omitempty"`  // option 17
	HeadURL   string       `json:"head_url,omitempty"`   // option 224
	Hostname  string       `json:"hostname,omitempty"`
	Domain    string       `json:"domain,omitempty"`
	MTU       int          `json:"mtu,omitempty"`

	Obtained time.Duration `json:"obtained"` // uptime at the last answer
	Lifetime time.Duration `json:"lifetime"` // counted from Obtained, as are the next two
	Renew    time.Duration `json:"renew"`    // T1
	Rebind   time.Duration `json:"rebind"`   // T2
}

// String is for a log line.
func (l Lease) String() string {
	return fmt.Sprintf("%s on %s from %s for %s", l.Address, l.Interface, l.Server, l.Lifetime)
}

// wanted is the parameter request list.
var wanted = []dhcpv4.OptionCode{
	dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer, dhcpv4.OptionHostName,
	dhcpv4.OptionDomainName, dhcpv4.OptionRootPath, dhcpv4.OptionInterfaceMTU, dhcpv4.OptionIPAddressLeaseTime,
	dhcpv4.OptionServerIdentifier, dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue, OptionHeadURL,
}

// vendorClass tells the head's DHCP server that the node itself asks, not its
// firmware.
const vendorClass = "krg"

// infinite is how the lease time of a lease without end is kept.
const infinite = 100 * 365 * 24 * time.Hour

// fromACK reads the server's answer. The address and a server identifier must
// be good; the rest is taken if it makes sense.
func fromACK(ack *dhcpv4.DHCPv4, ifname string, uptime time.Duration) (Lease, error) {
	l := Lease{
		Interface: ifname, MAC: ack.ClientHWAddr.String(), Server: addr(ack.ServerIdentifier()), Next: addr(ack.ServerIPAddr),
		RootPath: text(ack.RootPath()), HeadURL: text(string(ack.GetOneOption(OptionHeadURL))),
		Hostname: text(ack.HostName()), Domain: text(ack.DomainName()), Obtained: uptime,
	}
	a := addr(ack.YourIPAddr)
	if !a.IsValid() || a.IsLoopback() || a.IsMulticast() {
		return Lease{}, fmt.Errorf("DHCP answer has no usable address (%s)", ack.YourIPAddr)
	}
	bits := 24
	if m := ack.SubnetMask(); m != nil {
		ones, size := m.Size()
		if size != 32 || ones == 0 {
			return Lease{}, fmt.Errorf("DHCP answer has a bad subnet mask (%s)", m)
		}
		bits = ones
	}
	l.Address = netip.PrefixFrom(a, bits)
	if r := ack.Router(); len(r) > 0 {
		l.Router = addr(r[0])
	}
	for _, ip := range ack.DNS() {
		if d := addr(ip); d.IsValid() {
			l.DNS = append(l.DNS, d)
		}
	}
	if b := ack.GetOneOption(dhcpv4.OptionInterfaceMTU); len(b) == 2 {
		if mtu := int(b[0])<<8 | int(b[1]); mtu >= 576 { // RFC 2132, section 5.1, wants 68; IPv4 wants more
			l.MTU = mtu
		}
	}
	l.Lifetime = max(ack.IPAddressLeaseTime(time.Hour), time.Minute)
	if l.Lifetime >= (1<<32-1)*time.Second {
		l.Lifetime = infinite
	}
	l.Renew = ack.IPAddressRenewalTime(0)
	l.Rebind = ack.IPAddressRebindingTime(0)
	if l.Renew <= 0 || l.Rebind <= l.Renew || l.Lifetime <= l.Rebind {
		l.Renew, l.Rebind = l.Lifetime/2, l.Lifetime/8*7 // in this order: 41 years times 7 overflow
	}
	return l, nil
}

func addr(ip net.IP) netip.Addr {
	a, ok := netip.AddrFromSlice(ip.To4())
	if !ok || a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}

// text drops strings that aren't plain ASCII: some servers pad with NUL.
func text(s string) string {
	s = strings.TrimRight(s, "\x00")
	for _, r := range s {
		if r < ' ' || r > '~' {
			return ""
		}
	}
	return s
}

// Errors of one attempt.
var (
	ErrNoOffer = errors.New("no DHCP server answers")
	ErrNAK     = errors.New("the DHCP server refuses the address")
)

// Client asks for a first lease on one interface.
type Client struct {
	Interface string
	MAC       net.HardwareAddr
	Log       *slog.Logger
	Uptime    func() time.Duration
	// Listen opens the socket; nil means a packet socket, since the interface
	// has no address yet.
	Listen func() (net.PacketConn, error)
}

// broadcast is where a client without an address sends.
var broadcast = &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ServerPort}

// Acquire makes one attempt: DISCOVER, OFFER, REQUEST, ACK, within timeout.
// An offer that carries a head URL is taken at once; another is taken when
// no such offer comes within half the time, so that a stranger's DHCP server
// on the link doesn't win a race against the head.
func (c *Client) Acquire(ctx context.Context, timeout time.Duration) (Lease, error) {
	listen := c.Listen
	if listen == nil {
		listen = func() (net.PacketConn, error) { return nclient4.NewRawUDPConn(c.Interface, dhcpv4.ClientPort) }
	}
	conn, err := listen()
	if err != nil {
		return Lease{}, fmt.Errorf("DHCP on %s: %w", c.Interface, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	began := time.Now()

	xid := newXID(c.MAC)
	discover := message(c.MAC, xid, dhcpv4.MessageTypeDiscover, dhcpv4.WithBroadcast(true))
	var offer *dhcpv4.DHCPv4
	err = exchange(conn, discover, broadcast, began.Add(timeout/2), func(p *dhcpv4.DHCPv4) bool {
		if p.MessageType() != dhcpv4.MessageTypeOffer || !addr(p.YourIPAddr).IsValid() {
			return false
		}
		ours := len(p.GetOneOption(OptionHeadURL)) > 0
		if offer == nil || ours {
			offer = p
		}
		return ours
	})
	if ctx.Err() != nil {
		return Lease{}, ctx.Err()
	}
	if offer == nil {
		if err == nil || errors.Is(err, errTimeout) {
			err = ErrNoOffer
		}
		return Lease{}, fmt.Errorf("DHCP on %s: %w", c.Interface, err)
	}

	request := message(c.MAC, xid, dhcpv4.MessageTypeRequest, dhcpv4.WithBroadcast(true),
		dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(offer.YourIPAddr)),
		dhcpv4.WithOptionCopied(offer, dhcpv4.OptionServerIdentifier))
	ack, err := requestLease(conn, request, broadcast, began.Add(timeout))
	if ctx.Err() != nil {
		return Lease{}, ctx.Err()
	}
	if err != nil {
		return Lease{}, fmt.Errorf("DHCP on %s, offer of %s from %s: %w", c.Interface, offer.YourIPAddr, offer.ServerIdentifier(), err)
	}
	return fromACK(ack, c.Interface, c.Uptime())
}

// message makes a request of the kind t. The package dhcpv4's own makers wait
// for the kernel's random number generator, which on a machine without a
// hardware source takes minutes to get ready when nothing else happens.
func message(mac net.HardwareAddr, xid dhcpv4.TransactionID, t dhcpv4.MessageType, modifiers ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	d := &dhcpv4.DHCPv4{
		OpCode: dhcpv4.OpcodeBootRequest, HWType: iana.HWTypeEthernet, ClientHWAddr: mac, TransactionID: xid,
		ClientIPAddr: net.IPv4zero, YourIPAddr: net.IPv4zero, ServerIPAddr: net.IPv4zero, GatewayIPAddr: net.IPv4zero,
		Options: dhcpv4.Options{},
	}
	for _, m := range append(modifiers, dhcpv4.WithMessageType(t), dhcpv4.WithRequestedOptions(wanted...),
		dhcpv4.WithOption(dhcpv4.OptClassIdentifier(vendorClass)), dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(maxMessage))) {
		m(d)
	}
	return d
}

// maxMessage is a DHCP message that fits an Ethernet frame.
const maxMessage = 1472

// newXID needn't be secret, only different from those of other nodes that boot
// at the same moment with the same lack of randomness.
func newXID(mac net.HardwareAddr) dhcpv4.TransactionID {
	h := fnv.New32a()
	_, _ = h.Write(mac)
	var xid dhcpv4.TransactionID
	binary.BigEndian.PutUint32(xid[:], h.Sum32()^rand.Uint32())
	return xid
}

var errTimeout = errors.New("no answer")

// requestLease sends a REQUEST and waits for the ACK or NAK to it.
func requestLease(conn net.PacketConn, request *dhcpv4.DHCPv4, to net.Addr, deadline time.Time) (*dhcpv4.DHCPv4, error) {
	var answer *dhcpv4.DHCPv4
	err := exchange(conn, request, to, deadline, func(p *dhcpv4.DHCPv4) bool {
		t := p.MessageType()
		// A NAK by another server than the chosen one isn't ours to obey.
		if want := request.ServerIdentifier(); want != nil && p.ServerIdentifier() != nil && !want.Equal(p.ServerIdentifier()) {
			return false
		}
		if t == dhcpv4.MessageTypeAck || t == dhcpv4.MessageTypeNak {
			answer = p
		}
		return answer != nil
	})
	if err != nil {
		return nil, err
	}
	if answer.MessageType() == dhcpv4.MessageTypeNak {
		return nil, fmt.Errorf("%w: %q", ErrNAK, text(answer.Message()))
	}
	return answer, nil
}

// exchange sends p and hands replies to it to accept until that says yes or
// the deadline passes. The request is repeated after a third of the time, as
// the first frame after link-up is easily lost in a switch.
func exchange(conn net.PacketConn, p *dhcpv4.DHCPv4, to net.Addr, deadline time.Time, accept func(*dhcpv4.DHCPv4) bool) error {
	again := time.Now().Add(time.Until(deadline) / 3)
	if _, err := conn.WriteTo(p.ToBytes(), to); err != nil {
		return err
	}
	buf := make([]byte, 9000)
	for {
		next := deadline
		if !again.IsZero() {
			next = again
		}
		if err := conn.SetReadDeadline(next); err != nil {
			return err
		}
		n, _, err := conn.ReadFrom(buf)
		var timeout net.Error
		switch {
		case errors.As(err, &timeout) && timeout.Timeout():
			if again.IsZero() || !time.Now().Before(deadline) {
				return errTimeout
			}
			again = time.Time{}
			if _, err := conn.WriteTo(p.ToBytes(), to); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		}
		reply := parse(buf[:n])
		if reply == nil || reply.OpCode != dhcpv4.OpcodeBootReply || reply.TransactionID != p.TransactionID ||
			!bytes.Equal(reply.ClientHWAddr, p.ClientHWAddr) {
			continue
		}
		if accept(reply) {
			return nil
		}
	}
}

// parse returns nil for what isn't DHCP. A packet from the link must never
// bring PID 1 down, so a panic of the decoder is a bad packet, too.
func parse(b []byte) (p *dhcpv4.DHCPv4) {
	defer func() {
		if recover() != nil {
			p = nil
		}
	}()
	p, err := dhcpv4.FromBytes(b)
	if err != nil {
		return nil
	}
	return p
}
