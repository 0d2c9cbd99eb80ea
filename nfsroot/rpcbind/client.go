package rpcbind

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/sunrpc"
)

// ErrNotRegistered says that a machine has a directory, but not the program in
// it.
var ErrNotRegistered = errors.New("not registered with rpcbind")

// GetPort asks a machine for the TCP port of a program.
func GetPort(ctx context.Context, dial sunrpc.Dialer, host netip.Addr, prog, vers uint32) (uint16, error) {
	nc, err := dial(ctx, netip.AddrPortFrom(host, Port))
	if err != nil {
		return 0, fmt.Errorf("rpcbind of %s: %w", host, err)
	}
	defer nc.Close()
	d, err := sunrpc.Do(ctx, nc, sunrpc.ProgramRPCBind, 2, procGet, func(e *sunrpc.Encoder) {
		for _, v := range []uint32{prog, vers, protoTCP, 0} {
			e.Uint32(v)
		}
	})
	if err != nil {
		return 0, fmt.Errorf("rpcbind of %s: %w", host, err)
	}
	port := d.Uint32()
	if d.Bad() || port > 65535 {
		return 0, fmt.Errorf("rpcbind of %s: %w", host, sunrpc.ErrMessage)
	}
	if port == 0 {
		return 0, fmt.Errorf("program %d version %d of %s: %w", prog, vers, host, ErrNotRegistered)
	}
	return uint16(port), nil
}

// Register enters programs that listen on an address of this machine in its own
// directory, and returns a function that takes them out again. A place that is
// taken is an error, and nothing is entered then, unless nothing listens there:
// that is what a server that was killed leaves behind.
func Register(ctx context.Context, addr netip.Addr, entries []Entry) (unregister func(context.Context) error, err error) {
	var done []Entry
	unregister = func(ctx context.Context) error {
		var errs []error
		for _, e := range done {
			_, err := change(ctx, procUnset, e)
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}
	for _, e := range entries {
		entered, err := change(ctx, procSet, e)
		if err == nil && !entered && abandoned(ctx, addr, e) {
			if _, err = change(ctx, procUnset, e); err == nil {
				entered, err = change(ctx, procSet, e)
			}
		}
		if err == nil && !entered {
			err = fmt.Errorf("program %d version %d: %w", e.Prog, e.Vers, ErrTaken)
		}
		if err != nil {
			return nil, errors.Join(err, unregister(ctx))
		}
		done = append(done, e)
	}
	return unregister, nil
}

// ErrTaken says that another server is entered for a program.
var ErrTaken = errors.New("another server is registered with this machine's rpcbind")

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// abandoned says whether nothing listens where a program is entered.
func abandoned(ctx context.Context, addr netip.Addr, e Entry) bool {
	port, err := GetPort(ctx, sunrpc.Dial, loopback, e.Prog, e.Vers)
	if err != nil {
		return false
	}
	nc, err := sunrpc.Dial(ctx, netip.AddrPortFrom(addr, port))
	if err == nil {
		nc.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED)
}

// change calls SET or UNSET.
func change(ctx context.Context, proc uint32, e Entry) (bool, error) {
	nc, err := sunrpc.DialPrivileged(ctx, netip.AddrPortFrom(loopback, Port))
	if err != nil {
		return false, fmt.Errorf("this machine's rpcbind: %w", err)
	}
	defer nc.Close()
	d, err := sunrpc.Do(ctx, nc, sunrpc.ProgramRPCBind, 2, proc, func(x *sunrpc.Encoder) {
		proto := uint32(protoTCP)
		if e.Net == "udp" {
			proto = protoUDP
		}
		for _, v := range []uint32{e.Prog, e.Vers, proto, uint32(e.Port)} {
			x.Uint32(v)
		}
	})
	if err != nil {
		return false, fmt.Errorf("this machine's rpcbind: %w", err)
	}
	done := d.Bool()
	return done && !d.Bad(), nil
}
