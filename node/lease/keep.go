package lease

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"syscall"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"

	"krgimage/node/retry"
)

// Keeper renews a lease for as long as the node runs.
type Keeper struct {
	Log    *slog.Logger
	Clock  retry.Clock
	Uptime func() time.Duration
	// Ask sends one REQUEST for l, to its server or to all, and returns the
	// new lease; nil means Ask over UDP.
	Ask func(ctx context.Context, l Lease, all bool) (Lease, error)
	// Renewed is told of every renewal.
	Renewed func(Lease)
}

// minRetry is the shortest time between two attempts, RFC 2131 section 4.4.5.
const minRetry = time.Minute

// Keep renews l until ctx ends. After the lease has run out it goes on asking
// and leaves the address where it is.
func (k *Keeper) Keep(ctx context.Context, l Lease) error {
	ask := k.Ask
	if ask == nil {
		ask = k.askUDP
	}
	next := l.Renew
	for {
		if err := retry.Wait(ctx, k.Clock, max(l.Obtained+next-k.Uptime(), 0)); err != nil {
			return nil
		}
		age := k.Uptime() - l.Obtained
		got, err := ask(ctx, l, age >= l.Rebind)
		if err == nil && got.Address != l.Address {
			err = fmt.Errorf("the server now gives %s; the node keeps its address until it is rebooted", got.Address)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			k.Log.Debug("lease renewed", "lease", got.String())
			l, next = got, got.Renew
			if k.Renewed != nil {
				k.Renewed(l)
			}
			continue
		}
		// Half of what remains until the next step, and no end after the last.
		age = k.Uptime() - l.Obtained
		remaining := minRetry * 2
		switch {
		case age < l.Rebind:
			remaining = l.Rebind - age
		case age < l.Lifetime:
			remaining = l.Lifetime - age
		}
		next = age + max(remaining/2, minRetry)
		if age < l.Rebind {
			next = min(next, max(l.Rebind, age+time.Second))
		}
		level := slog.LevelInfo
		if age >= l.Rebind || errors.Is(err, ErrNAK) {
			level = slog.LevelWarn
		}
		k.Log.Log(ctx, level, "lease not renewed; the node keeps its address and asks again",
			"lease", l.String(), "age", age.Round(time.Second), "again_in", (next - age).Round(time.Second), "err", err)
	}
}

// askUDP sends the REQUEST from the address itself, which is configured by
// now; so an ordinary socket does.
func (k *Keeper) askUDP(ctx context.Context, l Lease, all bool) (Lease, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			err = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
				unix.BindToDevice(int(fd), l.Interface),
			)
		})
		return errors.Join(cerr, err)
	}}
	conn, err := lc.ListenPacket(ctx, "udp4", fmt.Sprintf("0.0.0.0:%d", dhcpv4.ClientPort))
	if err != nil {
		return Lease{}, fmt.Errorf("DHCP on %s: %w", l.Interface, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()

	mac, err := net.ParseMAC(l.MAC)
	if err != nil {
		return Lease{}, err
	}
	request := renewal(l, mac)
	to := broadcast
	if !all && l.Server.IsValid() {
		to = &net.UDPAddr{IP: l.Server.AsSlice(), Port: dhcpv4.ServerPort}
	}
	ack, err := requestLease(conn, request, to, time.Now().Add(10*time.Second))
	if err != nil {
		return Lease{}, fmt.Errorf("DHCP on %s, renewal at %s: %w", l.Interface, to.IP, err)
	}
	return fromACK(ack, l.Interface, k.Uptime())
}

// renewal makes the REQUEST of the RENEWING and REBINDING states: the address
// in ciaddr, neither a server identifier nor a requested address (RFC 2131,
// section 4.3.2).
func renewal(l Lease, mac net.HardwareAddr) *dhcpv4.DHCPv4 {
	return message(mac, newXID(mac), dhcpv4.MessageTypeRequest, dhcpv4.WithClientIP(l.Address.Addr().AsSlice()))
}
