package dhcp

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// ForeignWait is how long FindForeign listens. dnsmasq, which libvirt and many
// home routers use, pings an address for three seconds before it offers it.
const ForeignWait = 4 * time.Second

// ForeignServerError says that another DHCP server serves the link.
type ForeignServerError struct {
	Server    netip.Addr // its server identifier (option 54)
	Offered   netip.Addr // the address it offered to the probe
	Interface string
}

func (e *ForeignServerError) Error() string {
	return fmt.Sprintf("another DHCP server, %s, answers on %s (it offered %s): nodes would take whichever offer comes first. Stop that server, use a link of its own for the cluster, or serve nevertheless with --force", e.Server, e.Interface, e.Offered)
}

// FindForeign asks for an address on behalf of a machine that doesn't exist and
// waits for an offer of another server than own. It returns a
// *ForeignServerError if one comes, and nil after wait.
//
// The connection must be able to broadcast from the client port and to receive
// broadcasts there; it is left open, its read deadline changed.
func FindForeign(ctx context.Context, conn net.PacketConn, ifname string, own netip.Addr, wait time.Duration) error {
	// A made-up MAC: the question must not disturb any server's lease of a real
	// machine. Two low bits of the first byte: locally administered, not a group.
	mac := make(net.HardwareAddr, 6)
	rand.Read(mac)
	mac[0] = mac[0]&^1 | 2
	probe, err := dhcpv4.NewDiscovery(mac, dhcpv4.WithBroadcast(true))
	if err != nil {
		return fmt.Errorf("look for another DHCP server on %s: %w", ifname, err)
	}
	waiting, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	defer context.AfterFunc(waiting, func() { conn.SetReadDeadline(time.Unix(1, 0)) })()

	// Asked twice: one lost packet must not let two servers loose on a link.
	send := func() error {
		if _, err := conn.WriteTo(probe.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ServerPort}); err != nil {
			return fmt.Errorf("look for another DHCP server on %s: %w", ifname, err)
		}
		return nil
	}
	if err := send(); err != nil {
		return err
	}
	again := time.AfterFunc(wait/4, func() { send() })
	defer again.Stop()

	for buf := make([]byte, maxPacket); ; {
		n, _, err := conn.ReadFrom(buf)
		if err != nil {
			if waiting.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("look for another DHCP server on %s: %w", ifname, err)
		}
		if server, offered, ok := offer(buf[:n], probe); ok && server != own {
			return &ForeignServerError{server, offered, ifname}
		}
	}
}

// offer reads a packet that may be the answer to the probe.
func offer(data []byte, probe *dhcpv4.DHCPv4) (server, offered netip.Addr, ok bool) {
	p, err := dhcpv4.FromBytes(data)
	if err != nil || p.OpCode != dhcpv4.OpcodeBootReply || p.TransactionID != probe.TransactionID ||
		p.ClientHWAddr.String() != probe.ClientHWAddr.String() || p.MessageType() != dhcpv4.MessageTypeOffer {
		return server, offered, false
	}
	server = toAddr(p.ServerIdentifier())
	if !server.IsValid() {
		server = toAddr(p.ServerIPAddr)
	}
	return server, toAddr(p.YourIPAddr), server.IsValid()
}
