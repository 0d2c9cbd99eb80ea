package lease

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/insomniacslk/dhcp/dhcpv4"
)

var (
	testMAC = net.HardwareAddr{0x52, 0x54, 0, 0, 0, 3}
	server  = net.IP{10, 77, 0, 254}
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// wire is a packet connection to a server that is a function.
type wire struct {
	server   func(*dhcpv4.DHCPv4) [][]byte
	replies  chan []byte
	deadline time.Time
}

func newWire(server func(*dhcpv4.DHCPv4) [][]byte) *wire {
	return &wire{server: server, replies: make(chan []byte, 64)}
}

func (w *wire) WriteTo(b []byte, _ net.Addr) (int, error) {
	p, err := dhcpv4.FromBytes(b)
	if err != nil {
		return 0, err
	}
	for _, r := range w.server(p) {
		w.replies <- r
	}
	return len(b), nil
}

func (w *wire) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case r := <-w.replies:
		return copy(b, r), &net.UDPAddr{}, nil
	case <-time.After(time.Until(w.deadline)):
		return 0, nil, os.ErrDeadlineExceeded
	}
}

func (w *wire) Close() error                       { return nil }
func (w *wire) LocalAddr() net.Addr                { return &net.UDPAddr{} }
func (w *wire) SetDeadline(t time.Time) error      { w.deadline = t; return nil }
func (w *wire) SetReadDeadline(t time.Time) error  { w.deadline = t; return nil }
func (w *wire) SetWriteDeadline(t time.Time) error { return nil }

// reply makes an answer to q from the server with last byte id.
func reply(q *dhcpv4.DHCPv4, t dhcpv4.MessageType, id byte, more ...dhcpv4.Modifier) []byte {
	ip := net.IP{10, 77, 0, id}
	// Not NewReplyFromRequest: it copies options of the request.
	p := message(q.ClientHWAddr, q.TransactionID, t, append([]dhcpv4.Modifier{
		dhcpv4.WithYourIP(net.IP{10, 77, 0, 3}), dhcpv4.WithServerIP(ip), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(ip)),
		dhcpv4.WithNetmask(net.CIDRMask(24, 32)), dhcpv4.WithLeaseTime(7200),
	}, more...)...)
	p.OpCode = dhcpv4.OpcodeBootReply
	return p.ToBytes()
}

func headURL(url string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptGeneric(OptionHeadURL, []byte(url)))
}

func TestAcquire(t *testing.T) {
	full := func(q *dhcpv4.DHCPv4, kind dhcpv4.MessageType) []byte {
		return reply(q, kind, 254, headURL("http://10.77.0.254:80"), dhcpv4.WithOption(dhcpv4.OptRouter(net.IP{10, 77, 0, 1})),
			dhcpv4.WithOption(dhcpv4.OptDNS(net.IP{10, 77, 0, 53})), dhcpv4.WithOption(dhcpv4.OptHostName("krg-3")),
			dhcpv4.WithOption(dhcpv4.OptDomainName("krg")), dhcpv4.WithGeneric(dhcpv4.OptionInterfaceMTU, []byte{0x05, 0x78}))
	}
	complete := Lease{
		Interface: "eth0", MAC: "52:54:00:00:00:03", Address: netip.MustParsePrefix("10.77.0.3/24"),
		Router: netip.MustParseAddr("10.77.0.1"), DNS: []netip.Addr{netip.MustParseAddr("10.77.0.53")},
		Server: netip.MustParseAddr("10.77.0.254"), Next: netip.MustParseAddr("10.77.0.254"),
		HeadURL: "http://10.77.0.254:80", Hostname: "krg-3", Domain: "krg", MTU: 1400,
		Obtained: time.Minute, Lifetime: 2 * time.Hour, Renew: time.Hour, Rebind: 105 * time.Minute,
	}
	for _, tc := range []struct {
		name   string
		server func(*dhcpv4.DHCPv4) [][]byte
		want   Lease // compared by server if it has no interface
		err    error
	}{
		{name: "the head answers", want: complete, server: func(q *dhcpv4.DHCPv4) [][]byte {
			if q.MessageType() == dhcpv4.MessageTypeDiscover {
				return [][]byte{full(q, dhcpv4.MessageTypeOffer)}
			}
			return [][]byte{full(q, dhcpv4.MessageTypeAck)}
		}},
		{name: "a stranger is faster than the head", want: complete, server: func(q *dhcpv4.DHCPv4) [][]byte {
			switch {
			case q.MessageType() == dhcpv4.MessageTypeDiscover:
				return [][]byte{reply(q, dhcpv4.MessageTypeOffer, 9), full(q, dhcpv4.MessageTypeOffer)}
			case q.ServerIdentifier().Equal(server):
				// The stranger's NAK must not count.
				return [][]byte{reply(q, dhcpv4.MessageTypeNak, 9), full(q, dhcpv4.MessageTypeAck)}
			}
			return [][]byte{reply(q, dhcpv4.MessageTypeNak, 9)}
		}},
		{name: "only an ordinary server", want: Lease{Server: netip.MustParseAddr("10.77.0.9")}, server: func(q *dhcpv4.DHCPv4) [][]byte {
			if q.MessageType() == dhcpv4.MessageTypeDiscover {
				return [][]byte{reply(q, dhcpv4.MessageTypeOffer, 9)}
			}
			return [][]byte{reply(q, dhcpv4.MessageTypeAck, 9)}
		}},
		{name: "noise before the answer", want: complete, server: func(q *dhcpv4.DHCPv4) [][]byte {
			other := *q
			other.TransactionID[0] ^= 1
			neighbour := *q
			neighbour.ClientHWAddr = net.HardwareAddr{2, 0, 0, 0, 0, 1}
			kind := dhcpv4.MessageTypeOffer
			if q.MessageType() == dhcpv4.MessageTypeRequest {
				kind = dhcpv4.MessageTypeAck
			}
			return [][]byte{nil, []byte("junk"), q.ToBytes(), reply(&other, kind, 66), reply(&neighbour, kind, 67), full(q, kind)}
		}},
		{name: "nobody", err: ErrNoOffer, server: func(*dhcpv4.DHCPv4) [][]byte { return nil }},
		{name: "refused", err: ErrNAK, server: func(q *dhcpv4.DHCPv4) [][]byte {
			if q.MessageType() == dhcpv4.MessageTypeDiscover {
				return [][]byte{full(q, dhcpv4.MessageTypeOffer)}
			}
			return [][]byte{reply(q, dhcpv4.MessageTypeNak, 254)}
		}},
		{name: "offer without an address", err: ErrNoOffer, server: func(q *dhcpv4.DHCPv4) [][]byte {
			return [][]byte{reply(q, dhcpv4.MessageTypeOffer, 254, dhcpv4.WithYourIP(net.IPv4zero))}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := Client{
				Interface: "eth0", MAC: testMAC, Log: quiet(), Uptime: func() time.Duration { return time.Minute },
				Listen: func() (net.PacketConn, error) { return newWire(tc.server), nil },
			}
			got, err := c.Acquire(context.Background(), 200*time.Millisecond)
			if !errors.Is(err, tc.err) {
				t.Fatalf("error = %v, want %v", err, tc.err)
			}
			if tc.want.Interface == "" {
				if got.Server != tc.want.Server {
					t.Errorf("lease from %s, want %s", got.Server, tc.want.Server)
				}
				return
			}
			if diff := cmp.Diff(tc.want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
				t.Errorf("lease (-want +got):\n%s", diff)
			}
		})
	}
}

// timeline is a clock on which waiting costs nothing.
type timeline struct{ up time.Duration }

func (c *timeline) Now() time.Time { return time.Unix(0, 0).Add(c.up) }
func (c *timeline) After(d time.Duration) <-chan time.Time {
	c.up += d
	ch := make(chan time.Time, 1)
	ch <- time.Time{}
	return ch
}

// TestKeep follows one lease of 2 h (T1 1 h, T2 1 h 45 min) through what can
// happen to it.
func TestKeep(t *testing.T) {
	l := Lease{
		Interface: "eth0", Address: netip.MustParsePrefix("10.77.0.3/24"), Server: netip.MustParseAddr("10.77.0.254"),
		Lifetime: 2 * time.Hour, Renew: time.Hour, Rebind: 105 * time.Minute,
	}
	away := errors.New("no answer")
	type asked struct {
		At  time.Duration
		All bool
	}
	for _, tc := range []struct {
		name    string
		answers func(n int, now time.Duration) (Lease, error)
		want    []asked
	}{
		{"renewed in time, twice", func(_ int, now time.Duration) (Lease, error) {
			r := l
			r.Obtained = now
			return r, nil
		}, []asked{{60 * time.Minute, false}, {120 * time.Minute, false}}},
		{"server away until after the end", func(n int, now time.Duration) (Lease, error) {
			if n < 13 {
				return Lease{}, away
			}
			r := l
			r.Obtained = now
			return r, nil
		}, []asked{
			{60 * time.Minute, false}, {82*time.Minute + 30*time.Second, false}, {93*time.Minute + 45*time.Second, false},
			{99*time.Minute + 22500*time.Millisecond, false}, {102*time.Minute + 11250*time.Millisecond, false},
			{103*time.Minute + 35625*time.Millisecond, false}, {104*time.Minute + 35625*time.Millisecond, false},
			{105 * time.Minute, true}, {112*time.Minute + 30*time.Second, true}, {116*time.Minute + 15*time.Second, true},
			{118*time.Minute + 7500*time.Millisecond, true}, {119*time.Minute + 7500*time.Millisecond, true}, {120*time.Minute + 7500*time.Millisecond, true},
			{180*time.Minute + 7500*time.Millisecond, false},
		}},
		{"another address is not taken", func(_ int, now time.Duration) (Lease, error) {
			r := l
			r.Obtained, r.Address = now, netip.MustParsePrefix("10.77.0.9/24")
			return r, nil
		}, []asked{{60 * time.Minute, false}, {82*time.Minute + 30*time.Second, false}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			clock := &timeline{}
			var got []asked
			renewed := 0
			k := Keeper{
				Log: quiet(), Clock: clock, Uptime: func() time.Duration { return clock.up },
				Ask: func(_ context.Context, _ Lease, all bool) (Lease, error) {
					got = append(got, asked{clock.up, all})
					if len(got) == len(tc.want) {
						cancel()
					}
					return tc.answers(len(got), clock.up)
				},
				Renewed: func(n Lease) {
					renewed++
					if n.Address != l.Address {
						t.Errorf("address changed to %s", n.Address)
					}
				},
			}
			if err := k.Keep(ctx, l); err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("asked at\n%v, want\n%v", got, tc.want)
			}
		})
	}
}

// TestRenewal checks the REQUEST of a bound client, RFC 2131 table 5.
func TestRenewal(t *testing.T) {
	p := renewal(Lease{Address: netip.MustParsePrefix("10.77.0.3/24")}, testMAC)
	if !p.ClientIPAddr.Equal(net.IP{10, 77, 0, 3}) || p.MessageType() != dhcpv4.MessageTypeRequest || p.IsBroadcast() {
		t.Errorf("renewal = %s", p.Summary())
	}
	for _, o := range []dhcpv4.OptionCode{dhcpv4.OptionServerIdentifier, dhcpv4.OptionRequestedIPAddress} {
		if p.GetOneOption(o) != nil {
			t.Errorf("renewal carries %s", o)
		}
	}
	if list := p.ParameterRequestList(); !slices.ContainsFunc(list, func(c dhcpv4.OptionCode) bool { return c.Code() == 224 }) {
		t.Errorf("renewal doesn't ask for the head's URL: %s", list)
	}
}

func TestResolvConf(t *testing.T) {
	l := Lease{Domain: "krg", DNS: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}}
	if got, want := l.ResolvConf(), "search krg\nnameserver 10.0.0.1\nnameserver 10.0.0.2\n"; got != want {
		t.Errorf("got %q", got)
	}
	if got := (Lease{}).ResolvConf(); got != "" {
		t.Errorf("empty lease: %q", got)
	}
}

func FuzzAnswer(f *testing.F) {
	q := message(testMAC, newXID(testMAC), dhcpv4.MessageTypeRequest)
	f.Add(reply(q, dhcpv4.MessageTypeAck, 254, headURL("http://x")))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := parse(b)
		if p == nil {
			return
		}
		l, err := fromACK(p, "eth0", 0)
		if err != nil {
			return
		}
		if !l.Address.IsValid() || l.Renew <= 0 || l.Rebind <= l.Renew || l.Lifetime <= l.Rebind {
			t.Errorf("accepted %+v", l)
		}
		if strings.ContainsAny(l.HeadURL+l.Hostname+l.Domain+l.RootPath, "\x00\n\r") {
			t.Errorf("control characters in %+v", l)
		}
	})
}
