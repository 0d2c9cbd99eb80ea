// Package rpcbind is the directory of RPC programs on a machine: portmapper
// version 2 (RFC 1833 section 3) and rpcbind versions 3 and 4 (section 2) on
// port 111. A Linux NFS client finds the lock manager of its server with it,
// and the server that of the client; the client's kernel enters its own.
//
// Registry is the directory, Program what a sunrpc.Server serves of it, GetPort
// and Set are the client's side.
package rpcbind

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"krgimage/nfsroot/sunrpc"
)

// Port is where every machine has its directory.
const Port = 111

// Procedures; the first six have the same numbers in all versions.
const (
	procNull        = 0
	procSet         = 1
	procUnset       = 2
	procGet         = 3 // GETPORT, GETADDR
	procDump        = 4
	procGetTime     = 6
	procGetVersAddr = 9
)

// Protocol numbers of version 2 are those of IP.
const (
	protoTCP = 6
	protoUDP = 17
)

// Bounds: a directory has a dozen entries.
const (
	maxEntries = 256
	maxString  = 255
)

// Entry is one registration.
type Entry struct {
	Prog, Vers uint32
	Net        string // "tcp" or "udp"; "tcp6" and "udp6" are kept, too
	Port       uint16
	Owner      string
}

type key struct {
	prog, vers uint32
	net        string
}

// Registry is a directory. The zero value is an empty one; its methods may be
// called from any goroutine.
type Registry struct {
	mu      sync.Mutex
	entries map[key]Entry // guarded by mu
}

// Set enters a program. An entry that is there already stays, and Set says so.
func (r *Registry) Set(e Entry) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.entries == nil {
		r.entries = map[key]Entry{}
	}
	k := key{e.Prog, e.Vers, e.Net}
	if old, taken := r.entries[k]; taken {
		return old.Port == e.Port
	}
	if len(r.entries) >= maxEntries || e.Port == 0 {
		return false
	}
	r.entries[k] = e
	return true
}

// Unset takes a program out, for one network or, if net is empty, for all.
func (r *Registry) Unset(prog, vers uint32, net string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(r.entries)
	maps.DeleteFunc(r.entries, func(k key, _ Entry) bool {
		return k.prog == prog && k.vers == vers && (net == "" || k.net == net)
	})
	return len(r.entries) < n
}

// Find returns the port of a program, 0 if it is not there. Where the version
// is not there another one's port is the answer, as usual: the program itself
// then says which versions it has.
func (r *Registry) Find(prog, vers uint32, net string) uint16 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e, ok := r.entries[key{prog, vers, net}]; ok {
		return e.Port
	}
	var found Entry
	for k, e := range r.entries {
		if k.prog == prog && k.net == net && (found.Port == 0 || e.Vers > found.Vers) {
			found = e
		}
	}
	return found.Port
}

// Entries lists the directory in order.
func (r *Registry) Entries() []Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.SortedFunc(maps.Values(r.entries), func(a, b Entry) int {
		return cmp.Or(cmp.Compare(a.Prog, b.Prog), cmp.Compare(a.Vers, b.Vers), cmp.Compare(a.Net, b.Net))
	})
}

// Program serves the directory. allow decides who may look things up. Only root
// of the machine itself may change entries, and only if open is set.
func (r *Registry) Program(allow func(*sunrpc.Call) bool, open bool) sunrpc.Program {
	return sunrpc.Program{Number: sunrpc.ProgramRPCBind, Low: 2, High: 4, Handle: func(c *sunrpc.Call) sunrpc.Accept {
		if c.Proc == procNull {
			return sunrpc.Success
		}
		if allow != nil && !allow(c) {
			return sunrpc.SystemErr
		}
		may := open && c.Loopback() && c.Privileged
		if c.Vers == 2 {
			return r.portmap(c, may)
		}
		return r.rpcbind(c, may)
	}}
}

// portmap is version 2.
func (r *Registry) portmap(c *sunrpc.Call, mayChange bool) sunrpc.Accept {
	switch c.Proc {
	case procSet, procUnset, procGet:
		e := Entry{Prog: c.Args.Uint32(), Vers: c.Args.Uint32()}
		proto := c.Args.Uint32()
		port := c.Args.Uint32()
		if c.Args.Bad() || port > 65535 {
			return sunrpc.GarbageArgs
		}
		e.Net, e.Port = netOf(proto), uint16(port)
		switch c.Proc {
		case procSet:
			c.Reply.Bool(mayChange && e.Net != "" && r.Set(e))
		case procUnset:
			c.Reply.Bool(mayChange && r.Unset(e.Prog, e.Vers, "")) // all networks: RFC 1833 section 3.2
		default:
			c.Reply.Uint32(uint32(r.Find(e.Prog, e.Vers, e.Net)))
		}
	case procDump:
		for _, e := range r.Entries() {
			proto := uint32(protoTCP)
			switch e.Net {
			case "udp":
				proto = protoUDP
			case "tcp":
			default:
				continue
			}
			c.Reply.Bool(true)
			for _, v := range []uint32{e.Prog, e.Vers, proto, uint32(e.Port)} {
				c.Reply.Uint32(v)
			}
		}
		c.Reply.Bool(false)
	default:
		return sunrpc.ProcUnavail
	}
	return sunrpc.Success
}

func netOf(proto uint32) string {
	switch proto {
	case protoTCP:
		return "tcp"
	case protoUDP:
		return "udp"
	}
	return ""
}

// rpcbind is versions 3 and 4.
func (r *Registry) rpcbind(c *sunrpc.Call, mayChange bool) sunrpc.Accept {
	switch c.Proc {
	case procGetVersAddr:
		if c.Vers != 4 {
			return sunrpc.ProcUnavail
		}
		fallthrough
	case procSet, procUnset, procGet:
		e := Entry{Prog: c.Args.Uint32(), Vers: c.Args.Uint32(), Net: c.Args.String(maxString)}
		addr := c.Args.String(maxString)
		e.Owner = c.Args.String(maxString)
		if c.Args.Bad() {
			return sunrpc.GarbageArgs
		}
		switch c.Proc {
		case procSet:
			port, ok := parseUniversal(addr)
			e.Port = port
			c.Reply.Bool(mayChange && ok && e.Net != "" && r.Set(e))
		case procUnset:
			c.Reply.Bool(mayChange && r.Unset(e.Prog, e.Vers, e.Net))
		default:
			if e.Net == "" {
				e.Net = "tcp"
			}
			c.Reply.String(universal(c.Local, r.Find(e.Prog, e.Vers, e.Net)))
		}
	case procDump:
		for _, e := range r.Entries() {
			c.Reply.Bool(true)
			c.Reply.Uint32(e.Prog)
			c.Reply.Uint32(e.Vers)
			c.Reply.String(e.Net)
			c.Reply.String(universal(netip.IPv4Unspecified(), e.Port))
			c.Reply.String(e.Owner)
		}
		c.Reply.Bool(false)
	case procGetTime:
		c.Reply.Uint32(uint32(time.Now().Unix()))
	default:
		return sunrpc.ProcUnavail
	}
	return sunrpc.Success
}

// universal is an address in the form of RFC 5665 section 5.2.3.3, empty for no
// port.
func universal(a netip.Addr, port uint16) string {
	if port == 0 {
		return ""
	}
	if !a.Is4() {
		a = netip.IPv4Unspecified()
	}
	return fmt.Sprintf("%s.%d.%d", a, port>>8, port&0xff)
}

// parseUniversal reads the port of a universal address, whatever comes before.
func parseUniversal(s string) (uint16, bool) {
	rest, low, ok := cutLast(s)
	if !ok {
		return 0, false
	}
	_, high, ok := cutLast(rest)
	if !ok {
		return 0, false
	}
	l, err1 := strconv.ParseUint(low, 10, 8)
	h, err2 := strconv.ParseUint(high, 10, 8)
	return uint16(h<<8 | l), err1 == nil && err2 == nil
}

func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, '.')
	if i < 0 {
		return "", "", false
	}
	return s[:i], s[i+1:], true
}
