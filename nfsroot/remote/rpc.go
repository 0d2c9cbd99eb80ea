package remote

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// callTimeout bounds each connection, from dialling it to its last answer.
const callTimeout = 10 * time.Second

// maxReply bounds an answer; what is asked for is far smaller.
const maxReply = 64 << 10

// errReply says that an answer can't be understood.
var errReply = errors.New("the answer is not one of RFC 1813")

// client is a connection for ONC RPC (RFC 5531) over TCP, one call at a time.
type client struct {
	nc  net.Conn
	xid uint32
}

// dial connects from a port below 1024 where it may: servers trust those only,
// unless told otherwise.
func dial(ctx context.Context, server netip.Addr, port int) (*client, error) {
	deadline := time.Now().Add(callTimeout)
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	target := netip.AddrPortFrom(server, uint16(port)).String()
	nc, err := dialReserved(ctx, target)
	if err != nil {
		return nil, err
	}
	nc.SetDeadline(deadline)
	return &client{nc: nc, xid: rand.Uint32()}, nil
}

// reservedTries bounds the search for a free reserved port.
const reservedTries = 16

func dialReserved(ctx context.Context, target string) (net.Conn, error) {
	var d net.Dialer
	for range reservedTries {
		d.LocalAddr = &net.TCPAddr{Port: 665 + rand.IntN(1023-665)} // as mount.nfs(8) does
		d.Control = func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) {
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			})
		}
		nc, err := d.DialContext(ctx, "tcp4", target)
		switch {
		case errors.Is(err, unix.EADDRINUSE), errors.Is(err, unix.EADDRNOTAVAIL):
			continue
		case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
			return (&net.Dialer{}).DialContext(ctx, "tcp4", target)
		}
		return nc, err
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp4", target)
}

func (c *client) close() { c.nc.Close() }

func (c *client) null(prog, vers uint32) error {
	_, err := c.call(prog, vers, 0, &args{})
	return err
}

// call makes a call as root and returns its results.
func (c *client) call(prog, vers, proc uint32, a *args) (*results, error) {
	c.xid++
	head := (&args{}).u32(0, c.xid, 0, 2, prog, vers, proc)
	cred := (&args{}).u32(0).text("krgimage").u32(0, 0, 0)
	head.u32(1).opaque(cred.b).u32(0, 0)
	record := append(head.b, a.b...)
	binary.BigEndian.PutUint32(record, 1<<31|uint32(len(record)-4))
	if _, err := c.nc.Write(record); err != nil {
		return nil, err
	}
	reply, err := c.record()
	if err != nil {
		return nil, err
	}
	r := &results{b: reply}
	if xid, kind, denied := r.u32(), r.u32(), r.u32(); r.bad || xid != c.xid || kind != 1 {
		return nil, errReply
	} else if denied != 0 {
		return nil, errors.New("the server refuses AUTH_SYS")
	}
	r.u32() // verifier
	r.opaque(400)
	switch accepted := r.u32(); {
	case r.bad:
		return nil, errReply
	case accepted == 1:
		return nil, fmt.Errorf("program %d is not served", prog)
	case accepted == 2:
		return nil, fmt.Errorf("program %d is not served in version %d", prog, vers)
	case accepted != 0:
		return nil, fmt.Errorf("the server doesn't take the call (RFC 5531, accept_stat %d)", accepted)
	}
	return r, nil
}

func (c *client) record() ([]byte, error) {
	var all []byte
	for {
		var mark [4]byte
		if _, err := io.ReadFull(c.nc, mark[:]); err != nil {
			return nil, err
		}
		n := binary.BigEndian.Uint32(mark[:])
		last, n := n>>31 == 1, n&^(1<<31)
		if n > maxReply || len(all)+int(n) > maxReply || n == 0 && !last {
			return nil, errReply
		}
		at := len(all)
		all = append(all, make([]byte, n)...)
		if _, err := io.ReadFull(c.nc, all[at:]); err != nil {
			return nil, err
		}
		if last {
			return all, nil
		}
	}
}

// args are a call's arguments in XDR (RFC 4506).
type args struct{ b []byte }

func (a *args) u32(values ...uint32) *args {
	for _, v := range values {
		a.b = binary.BigEndian.AppendUint32(a.b, v)
	}
	return a
}

func (a *args) opaque(p []byte) *args {
	a.u32(uint32(len(p)))
	a.b = append(a.b, p...)
	for len(a.b)%4 != 0 {
		a.b = append(a.b, 0)
	}
	return a
}

func (a *args) text(s string) *args { return a.opaque([]byte(s)) }

// results are a reply's results; bad after reading past their end.
type results struct {
	b   []byte
	bad bool
}

func (r *results) skip(n int) []byte {
	if n > len(r.b) {
		r.bad, r.b = true, nil
		return nil
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *results) u32() uint32 {
	p := r.skip(4)
	if p == nil {
		return 0
	}
	return binary.BigEndian.Uint32(p)
}

func (r *results) opaque(limit uint32) []byte {
	n := r.u32()
	if n > limit {
		r.bad = true
		return nil
	}
	p := r.skip(int(n))
	r.skip(int(-n & 3))
	return p
}
