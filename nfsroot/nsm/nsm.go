// Package nsm is the network status monitor protocol, version 1 (X/Open XNFS
// chapter 11), as far as file locking needs it: a machine that comes up tells
// those with whom it shared locks, by SM_NOTIFY, and they free or reclaim them.
//
// A state number counts the lives of a machine: odd when it is up, and another
// one after each boot.
package nsm

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"krgimage/nfsroot/rpcbind"
	"krgimage/nfsroot/sunrpc"
)

// Procedures of program 100024 version 1.
const (
	Version = 1

	ProcNull      = 0
	ProcStat      = 1
	ProcMon       = 2
	ProcUnmon     = 3
	ProcUnmonAll  = 4
	ProcSimuCrash = 5
	ProcNotify    = 6
)

// MaxName is SM_MAXSTRLEN.
const MaxName = 1024

// Notice is the argument of SM_NOTIFY.
type Notice struct {
	Name  string // of the machine that came up
	State int32
}

// DecodeNotice reads a Notice.
func DecodeNotice(d *sunrpc.Decoder) Notice {
	return Notice{Name: d.String(MaxName), State: int32(d.Uint32())}
}

// Encode writes a Notice.
func (n Notice) Encode(e *sunrpc.Encoder) {
	e.String(n.Name)
	e.Uint32(uint32(n.State))
}

// Send tells the status monitor of a machine.
func (n Notice) Send(ctx context.Context, dial sunrpc.Dialer, to netip.Addr) error {
	port, err := rpcbind.GetPort(ctx, dial, to, sunrpc.ProgramNSM, Version)
	if err != nil {
		return err
	}
	nc, err := dial(ctx, netip.AddrPortFrom(to, port))
	if err != nil {
		return err
	}
	defer nc.Close()
	if _, err := sunrpc.Do(ctx, nc, sunrpc.ProgramNSM, Version, ProcNotify, n.Encode); err != nil {
		return fmt.Errorf("SM_NOTIFY to %s: %w", to, err)
	}
	return nil
}

// StateAt is the state number of a machine that came up at a time. It needs no
// memory, only a clock that does not run backwards between two boots, which are
// never within two seconds.
func StateAt(boot time.Time) int32 {
	const epoch = 1577836800 // 2020: leaves room up to 2088
	return int32(boot.Unix()-epoch)&0x7fffffff | 1
}
