package sunrpc

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Dialer opens a TCP connection.
type Dialer func(ctx context.Context, to netip.AddrPort) (net.Conn, error)

// Dial connects as the machine does.
func Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", to.String())
}

// DialFrom connects from a given address.
func DialFrom(local netip.Addr) Dialer {
	return func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(local, 0))}
		return d.DialContext(ctx, "tcp", to.String())
	}
}

// DialPrivileged connects from a port below 1024: proof to the other side, as
// far as it trusts this machine, that root speaks.
func DialPrivileged(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	const low = 512 // below are the ports of well-known services
	start := rand.IntN(privilegedPorts - low)
	var err error
	for i := range privilegedPorts - low {
		port := low + (start+i)%(privilegedPorts-low)
		d := net.Dialer{LocalAddr: &net.TCPAddr{Port: port}, Control: reuse}
		var nc net.Conn
		if nc, err = d.DialContext(ctx, "tcp4", to.String()); err == nil {
			return nc, nil
		}
		if ctx.Err() != nil || !isTaken(err) {
			return nil, err
		}
	}
	return nil, err
}

// reuse lets a port be taken again whose last connection, to another place,
// still lingers.
func reuse(_, _ string, raw syscall.RawConn) (err error) {
	if e := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }); e != nil {
		return e
	}
	return err
}

func isTaken(err error) bool {
	return strings.Contains(err.Error(), unix.EADDRINUSE.Error()) || strings.Contains(err.Error(), unix.EADDRNOTAVAIL.Error())
}

// Do makes one call on a stream connection on which no other is under way, as
// root (AUTH_SYS) of a machine without a name.
func Do(ctx context.Context, nc net.Conn, prog, vers, proc uint32, args func(*Encoder)) (*Decoder, error) {
	if deadline, ok := ctx.Deadline(); ok {
		_ = nc.SetDeadline(deadline)
	}
	defer context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })()
	xid := rand.Uint32()
	e := &Encoder{}
	for _, v := range []uint32{xid, msgCall, version, prog, vers, proc, flavorSys, 20, 0, 0, 0, 0, 0, flavorNone, 0} {
		e.Uint32(v)
	}
	if args != nil {
		args(e)
	}
	if err := writeMessage(nc, e.b); err != nil {
		return nil, err
	}
	for {
		message, err := readMessage(nc)
		if err != nil {
			return nil, err
		}
		d := NewDecoder(message)
		if d.Uint32() == xid {
			return result(d)
		}
		// The answer to a call that was given up.
	}
}

func result(d *Decoder) (*Decoder, error) {
	typ, stat := d.Uint32(), d.Uint32()
	if d.bad || typ != msgReply {
		return nil, fmt.Errorf("%w: not a reply", ErrMessage)
	}
	if stat == replyDenied {
		return nil, fmt.Errorf("RPC: call denied (%d)", d.Uint32())
	}
	d.Uint32() // the verifier: flavor and body
	d.Opaque(400)
	accept := Accept(d.Uint32())
	if d.bad {
		return nil, fmt.Errorf("%w: truncated reply", ErrMessage)
	}
	if accept != Success {
		return nil, &Error{accept}
	}
	return d, nil
}
