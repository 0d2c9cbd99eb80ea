package rpcbind

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

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

// Register enters programs in this machine's own directory and returns a
// function that takes them out again. Whose place is taken is an error, and
// nothing is entered then.
func Register(ctx context.Context, entries []Entry) (unregister func(context.Context) error, err error) {
	here := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), Port)
	change := func(ctx context.Context, proc uint32, e Entry) error {
		nc, err := sunrpc.DialPrivileged(ctx, here)
		if err != nil {
			return fmt.Errorf("this machine's rpcbind: %w", err)
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
			return fmt.Errorf("this machine's rpcbind: %w", err)
		}
		if done := d.Bool(); !done || d.Bad() {
			return fmt.Errorf("this machine's rpcbind: program %d version %d has another server already", e.Prog, e.Vers)
		}
		return nil
	}
	var done []Entry
	unregister = func(ctx context.Context) error {
		var errs []error
		for _, e := range done {
			errs = append(errs, change(ctx, procUnset, e))
		}
		return errors.Join(errs...)
	}
	for _, e := range entries {
		if err := change(ctx, procSet, e); err != nil {
			return nil, errors.Join(err, unregister(ctx))
		}
		done = append(done, e)
	}
	return unregister, nil
}
