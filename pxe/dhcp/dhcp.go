// Package dhcp is the head node's DHCPv4 server: it serves one subnet, gives the
// cluster's own machines the addresses that the node registry has for them, and
// tells a machine that boots from the network what to load next.
//
// A packet goes three steps, each a function without side effects on the next:
// Classify makes one typed value of it (who asks, with which firmware), boot
// picks the boot file for that firmware from a table, and the server answers as
// RFC 2131 §4.3 says for the message type. Nothing is kept between two packets
// but what the registry knows.
//
// The package never hands an address to a machine that the registry refuses, and
// never answers through a relay. Whether another DHCP server already serves a
// link is asked by FindForeign, before serving starts.
package dhcp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sync/errgroup"

	"krgimage/configs"
	"krgimage/pxe/nodes"
)

// OptionHeadURL carries the head's URL as ASCII, e.g. http://10.77.0.254:80. It
// is from the site-specific range (RFC 3942: 224..254) and always sent.
const OptionHeadURL = dhcpv4.GenericOptionCode(224)

// Registry is what the server needs of the node registry.
type Registry interface {
	// Assign returns the machine, new ones by the discovery policy.
	Assign(configs.MAC) (nodes.Node, error)
	// Lookup returns a machine that is known already.
	Lookup(configs.MAC) (nodes.Node, bool)
	// IsRevoked says whether a machine was locked out.
	IsRevoked(configs.MAC) bool
	Leased(mac configs.MAC, until time.Time)
	Released(configs.MAC)
	// Discovering notes a firmware's DISCOVER.
	Discovering(mac configs.MAC, ipxe bool, firmware string)
	Saw(mac configs.MAC, s nodes.Stage, detail string)
	// LoaderAge is the time since the machine fetched a loader in this boot.
	LoaderAge(configs.MAC) (time.Duration, bool)
}

// Config is what a Server works from.
type Config struct {
	Cluster configs.Cluster
	Nodes   Registry
	Root    string           // SERVER:PATH of the nodes' root, with its mount options
	Log     *slog.Logger     // nil: silent
	Now     func() time.Time // nil: time.Now
}

// Server answers DHCP packets. It has no state but its limit on log lines.
type Server struct {
	net     configs.Network
	domain  string
	boot    configs.Boot
	head    netip.Addr
	headURL string
	root    string
	nodes   Registry
	log     *slog.Logger
	now     func() time.Time

	mu    sync.Mutex
	quiet map[string]time.Time // what was logged of whom, and when; guarded by mu
}

// New returns a server for the cluster's boot network.
func New(cfg Config) *Server {
	s := &Server{
		net:     cfg.Cluster.Network,
		domain:  cfg.Cluster.Name,
		boot:    cfg.Cluster.Boot,
		head:    cfg.Cluster.Network.Head,
		headURL: fmt.Sprintf("http://%s:%d", cfg.Cluster.Network.Head, cfg.Cluster.Network.HTTPPort),
		root:    cfg.Root,
		nodes:   cfg.Nodes,
		log:     cfg.Log,
		now:     cfg.Now,
		quiet:   map[string]time.Time{},
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.log = s.log.With("component", "dhcp")
	if s.now == nil {
		s.now = time.Now
	}
	return s
}

// Serving is bounded: a flood of packets costs these workers and this queue and
// no more; what does not fit is dropped, and clients repeat themselves.
const (
	workers   = 4
	queueLen  = 256
	maxPacket = 1500
)

// Serve answers what comes in on conn until ctx ends, and closes conn. The
// connection must be able to send broadcasts and belong to the one link that is
// served.
func (s *Server) Serve(ctx context.Context, conn net.PacketConn) error {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	type packet struct {
		data []byte
		from net.Addr
	}
	queue := make(chan packet, queueLen)
	var group errgroup.Group
	for range workers {
		group.Go(func() error {
			for p := range queue {
				s.answer(conn, p.data, p.from)
			}
			return nil
		})
	}
	var err error
	for buf := make([]byte, maxPacket); ; {
		var n int
		var from net.Addr
		if n, from, err = conn.ReadFrom(buf); err != nil {
			break
		}
		select {
		case queue <- packet{append([]byte(nil), buf[:n]...), from}:
		default:
			s.warn("queue", "more DHCP packets than can be answered: some are dropped")
		}
	}
	close(queue)
	group.Wait()
	if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return fmt.Errorf("DHCP: receive: %w", err)
}

func (s *Server) answer(conn net.PacketConn, data []byte, from net.Addr) {
	request, err := dhcpv4.FromBytes(data)
	if err != nil {
		s.warn("malformed", "malformed DHCP packet ignored", "from", from, "err", err)
		return
	}
	reply, to := s.Handle(request)
	if reply == nil {
		return
	}
	if _, err := conn.WriteTo(reply.ToBytes(), to); err != nil {
		s.warn("send", "DHCP reply not sent", "mac", request.ClientHWAddr, "to", to, "err", err)
	}
}

// Handle returns the answer to a request and where to send it, or nil.
func (s *Server) Handle(request *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, *net.UDPAddr) {
	c, err := Classify(request)
	if err != nil {
		s.warn("odd/"+request.ClientHWAddr.String(), "DHCP packet ignored", "mac", request.ClientHWAddr, "err", err)
		return nil, nil
	}
	switch request.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		return s.discover(request, c)
	case dhcpv4.MessageTypeRequest:
		return s.request(request, c)
	case dhcpv4.MessageTypeInform:
		return s.inform(request, c)
	case dhcpv4.MessageTypeRelease:
		if n, ok := s.nodes.Lookup(c.MAC); ok && toAddr(request.ClientIPAddr) == n.Address && s.forUs(request) {
			s.nodes.Released(c.MAC)
		}
	case dhcpv4.MessageTypeDecline:
		if n, ok := s.nodes.Lookup(c.MAC); ok && s.forUs(request) {
			s.nodes.Released(c.MAC)
			s.log.Error(fmt.Sprintf("the machine says that another one uses its address %s: find it, or give node %d another address in nodes.table", n.Address, n.ID),
				"mac", c.MAC, "node", n.ID)
		}
	}
	return nil, nil
}

// forUs says whether a message that names a server names this one.
func (s *Server) forUs(request *dhcpv4.DHCPv4) bool {
	return toAddr(request.ServerIdentifier()) == s.head
}

func (s *Server) discover(request *dhcpv4.DHCPv4, c Client) (*dhcpv4.DHCPv4, *net.UDPAddr) {
	n, ok := s.nodes.Lookup(c.MAC)
	if !ok {
		if !c.MayBecomeNode() {
			s.info("plain/"+string(c.MAC), "unknown machine gets no address: only machines that boot from the network are discovered", "mac", c.MAC, "reason", c.NotNetboot)
			return nil, nil
		}
		var err error
		if n, err = s.nodes.Assign(c.MAC); err != nil {
			s.warn("assign/"+string(c.MAC), "machine gets no address", "mac", c.MAC, "err", err)
			return nil, nil
		}
	} else if _, err := s.nodes.Assign(c.MAC); err != nil { // notes when it was first seen
		s.warn("assign/"+string(c.MAC), "machine gets no address", "mac", c.MAC, "err", err)
		return nil, nil
	}
	if c.NotNetboot == "" {
		s.nodes.Discovering(c.MAC, c.IPXE, c.String())
	}
	return s.reply(request, c, n, dhcpv4.MessageTypeOffer), broadcast
}

// request tells the four kinds of REQUEST apart (RFC 2131 §4.3.2, table 4). A
// machine that the registry does not know is never answered, not even with a
// refusal: its address may be another server's business.
func (s *Server) request(request *dhcpv4.DHCPv4, c Client) (*dhcpv4.DHCPv4, *net.UDPAddr) {
	n, ok := s.nodes.Lookup(c.MAC)
	if !ok && s.nodes.IsRevoked(c.MAC) && (!request.Options.Has(dhcpv4.OptionServerIdentifier) || s.forUs(request)) {
		s.warn("revoked/"+string(c.MAC), "machine gets no address", "mac", c.MAC, "err", nodes.ErrRevoked)
		return s.nak(request, "this machine was revoked"), broadcast
	}
	if !ok {
		return nil, nil
	}
	wanted, renewing := toAddr(request.RequestedIPAddress()), false
	switch {
	case request.Options.Has(dhcpv4.OptionServerIdentifier): // SELECTING
		if !s.forUs(request) {
			s.warn("other/"+string(c.MAC), "the machine took another server's offer: two DHCP servers are on this link",
				"mac", c.MAC, "node", n.ID, "server", request.ServerIdentifier())
			return nil, nil
		}
	case wanted.IsValid() && !wanted.IsUnspecified(): // INIT-REBOOT
	default: // RENEWING, REBINDING
		wanted, renewing = toAddr(request.ClientIPAddr), true
	}
	if wanted != n.Address {
		s.log.Info("refused: the machine asks for an address that is not its own", "mac", c.MAC, "node", n.ID, "wanted", wanted, "address", n.Address)
		return s.nak(request, fmt.Sprintf("the address of this machine is %s", n.Address)), broadcast
	}
	reply := s.reply(request, c, n, dhcpv4.MessageTypeAck)
	s.nodes.Leased(c.MAC, s.now().Add(time.Duration(s.net.Lease)))
	if c.IPXE && s.bootFor(c).script {
		s.nodes.Saw(c.MAC, nodes.StageIPXE, "")
	}
	if renewing {
		return reply, &net.UDPAddr{IP: n.Address.AsSlice(), Port: dhcpv4.ClientPort}
	}
	return reply, broadcast
}

// inform answers a machine that has its address already (RFC 2131 §4.3.5).
func (s *Server) inform(request *dhcpv4.DHCPv4, c Client) (*dhcpv4.DHCPv4, *net.UDPAddr) {
	n, ok := s.nodes.Lookup(c.MAC)
	if !ok || toAddr(request.ClientIPAddr) != n.Address {
		return nil, nil
	}
	reply := s.reply(request, c, n, dhcpv4.MessageTypeAck)
	reply.YourIPAddr = net.IPv4zero
	for _, o := range []dhcpv4.OptionCode{dhcpv4.OptionIPAddressLeaseTime, dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue} {
		reply.DeleteOption(o)
	}
	return reply, &net.UDPAddr{IP: n.Address.AsSlice(), Port: dhcpv4.ClientPort}
}

// broadcast is where every answer goes that isn't a renewal: firmwares set the
// broadcast flag wrongly more often than not, and an unicast to an address that
// isn't configured yet would need a raw socket.
var broadcast = &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ClientPort}

// quietFor is how long a kind of line about one machine is logged only once.
const quietFor = time.Minute

func (s *Server) warn(kind, msg string, args ...any) { s.limited(slog.LevelWarn, kind, msg, args) }
func (s *Server) info(kind, msg string, args ...any) { s.limited(slog.LevelInfo, kind, msg, args) }

func (s *Server) limited(level slog.Level, kind, msg string, args []any) {
	s.mu.Lock()
	now := s.now()
	last, seen := s.quiet[kind]
	if seen && now.Sub(last) < quietFor {
		s.mu.Unlock()
		return
	}
	if len(s.quiet) >= 1024 { // MACs can be made up: forget rather than grow
		clear(s.quiet)
	}
	s.quiet[kind] = now
	s.mu.Unlock()
	s.log.Log(context.Background(), level, msg, args...)
}

// toAddr is an IPv4 address of a packet; the zero Addr if there is none.
func toAddr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip.To4())
	return a
}
