package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"
)

// Programs and procedures (RFC 1813).
const (
	progNFS   = 100003
	progMount = 100005

	procGetattr     = 1
	procSetattr     = 2
	procLookup      = 3
	procRead        = 6
	procWrite       = 7
	procCreate      = 8
	procMkdir       = 9
	procRemove      = 12
	procReadDir     = 16
	procReadDirPlus = 17
	procCommit      = 21
)

const maxIO = 1 << 20

// enc appends XDR to the calls that wait for being sent.
type enc struct{ b []byte }

func (e *enc) u32(v uint32) { e.b = binary.BigEndian.AppendUint32(e.b, v) }
func (e *enc) u64(v uint64) { e.b = binary.BigEndian.AppendUint64(e.b, v) }

func (e *enc) opaque(p []byte) {
	e.u32(uint32(len(p)))
	e.b = append(e.b, p...)
	e.b = append(e.b, "\x00\x00\x00"[:-len(p)&3]...)
}

func (e *enc) str(s string) {
	e.u32(uint32(len(s)))
	e.b = append(e.b, s...)
	e.b = append(e.b, "\x00\x00\x00"[:-len(s)&3]...)
}

// sattr encodes a sattr3 with a mode, and the times now if asked to.
func (e *enc) sattr(mode uint32, times bool) {
	e.u32(1)
	e.u32(mode)
	for range 3 {
		e.u32(0) // uid, gid, size
	}
	how := uint32(0)
	if times {
		how = 1
	}
	e.u32(how)
	e.u32(how)
}

// dec reads the results of a call. Its first error stays.
type dec struct {
	b   []byte
	err error
}

func (d *dec) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf(format, args...)
	}
}

func (d *dec) take(n int) []byte {
	if d.err != nil || n < 0 || n > len(d.b) {
		d.fail("reply is too short")
		return nil
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

func (d *dec) u32() uint32 {
	if p := d.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

func (d *dec) u64() uint64 { return uint64(d.u32())<<32 | uint64(d.u32()) }

func (d *dec) opaque() []byte {
	n := int(d.u32())
	p := d.take(n)
	d.take(-n & 3)
	return p
}

// status reads the status of a result; all but OK is an error of the run.
func (d *dec) status(what string) {
	if st := d.u32(); st != 0 {
		d.fail("%s: status %d", what, st)
	}
}

// attrs skips a post_op_attr and returns the file type, 0 without one.
func (d *dec) attrs() uint32 {
	if d.u32() == 0 {
		return 0
	}
	p := d.take(84)
	if p == nil {
		return 0
	}
	return binary.BigEndian.Uint32(p)
}

// handle reads a post_op_fh3.
func (d *dec) handle() []byte {
	if d.u32() == 0 {
		return nil
	}
	return append([]byte(nil), d.opaque()...)
}

// task is one of the sequences of calls that a connection has going at the same
// time. It reads the results of its call before (nil at first), appends the
// arguments of its next and names the procedure; 0 ends it.
type task func(d *dec, e *enc) (proc uint32)

// client is one connection. One goroutine does all: calls that became due
// together go out in one write, replies that came together are read in one
// read, so that it needs little beside a server.
type client struct {
	nc   net.Conn
	prog uint32
	head []byte // of a call, from its mark to the verifier
	out  enc
	in   []byte
	seq  uint32
}

const headProc = 4 + 5*4 // offset of the procedure number

func dial(addr string, prog uint32) (*client, error) {
	nc, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		return nil, err
	}
	c := &client{nc: nc, prog: prog, in: make([]byte, 0, 4*maxIO)}
	e := &enc{b: make([]byte, 4)}
	for _, v := range []uint32{0, 0, 2, prog, 3, 0} {
		e.u32(v)
	}
	cred := &enc{}
	cred.u32(1)
	cred.str("load")
	for range 3 {
		cred.u32(0) // uid, gid, no groups
	}
	e.u32(1) // AUTH_SYS
	e.opaque(cred.b)
	e.u32(0)
	e.u32(0)
	c.head = e.b
	return c, nil
}

// run drives the tasks to their ends.
func (c *client) run(tasks []task) error {
	open := 0
	start := func(slot int, d *dec) error {
		at := len(c.out.b)
		c.out.b = append(c.out.b, c.head...)
		proc := tasks[slot](d, &c.out)
		if d != nil && d.err != nil {
			return d.err
		}
		if proc == 0 {
			c.out.b = c.out.b[:at]
			open--
			return nil
		}
		call := c.out.b[at:]
		c.seq++
		binary.BigEndian.PutUint32(call, 1<<31|uint32(len(call)-4))
		binary.BigEndian.PutUint32(call[4:], c.seq<<8|uint32(slot))
		binary.BigEndian.PutUint32(call[headProc:], proc)
		return nil
	}
	open = len(tasks)
	for slot := range tasks {
		if err := start(slot, nil); err != nil {
			return err
		}
	}
	c.in = c.in[:0]
	for open > 0 {
		if len(c.out.b) > 0 {
			if _, err := c.nc.Write(c.out.b); err != nil {
				return err
			}
			c.out.b = c.out.b[:0]
		}
		c.nc.SetReadDeadline(time.Now().Add(2 * time.Minute))
		n, err := c.nc.Read(c.in[len(c.in):cap(c.in)])
		if err != nil {
			return err
		}
		c.in = c.in[:len(c.in)+n]
		rest := c.in
		for {
			rec, after, whole, err := record(rest)
			if err != nil {
				return err
			}
			if !whole {
				break
			}
			rest = after
			d := &dec{b: rec}
			slot := int(d.u32() & 0xff)
			if d.u32() != 1 || d.u32() != 0 || d.u32() != 0 || d.u32() != 0 || d.u32() != 0 || slot >= len(tasks) {
				return fmt.Errorf("call was not accepted: % x", rec[:min(len(rec), 32)])
			}
			if err := start(slot, d); err != nil {
				return err
			}
		}
		c.in = c.in[:copy(c.in, rest)]
	}
	return nil
}

// record splits the first record off. Fragments are joined in place.
func record(b []byte) (rec, rest []byte, whole bool, err error) {
	join := 0
	for at := 0; at+4 <= len(b); {
		mark := binary.BigEndian.Uint32(b[at:])
		n := int(mark &^ (1 << 31))
		if n > 2*maxIO {
			return nil, nil, false, errors.New("reply is longer than any can be")
		}
		if at+4+n > len(b) {
			return nil, b, false, nil
		}
		if mark>>31 == 1 {
			if join == 0 {
				return b[at+4 : at+4+n], b[at+4+n:], true, nil
			}
			rec = append(append([]byte(nil), joined(b[:at])...), b[at+4:at+4+n]...)
			return rec, b[at+4+n:], true, nil
		}
		join++
		at += 4 + n
	}
	return nil, b, false, nil
}

// joined is the content of whole fragments.
func joined(b []byte) (out []byte) {
	for len(b) > 0 {
		n := int(binary.BigEndian.Uint32(b) &^ (1 << 31))
		out = append(out, b[4:4+n]...)
		b = b[4+n:]
	}
	return out
}

// call does a single call.
func (c *client) call(proc uint32, args func(*enc), results func(*dec)) error {
	return c.run([]task{func(d *dec, e *enc) uint32 {
		if d != nil {
			results(d)
			return 0
		}
		args(e)
		return proc
	}})
}

// mount asks a MOUNT service for the root handle of a path.
func mount(addr, path string) (root []byte, err error) {
	c, err := dial(addr, progMount)
	if err != nil {
		return nil, err
	}
	defer c.nc.Close()
	err = c.call(1, func(e *enc) { e.str(path) }, func(d *dec) {
		d.status("MNT " + path)
		root = append(root, d.opaque()...)
	})
	return root, err
}

// lookup walks names from a handle.
func (c *client) lookup(h []byte, names ...string) ([]byte, error) {
	for _, name := range names {
		var next []byte
		err := c.call(procLookup, func(e *enc) { e.opaque(h); e.str(name) }, func(d *dec) {
			d.status("LOOKUP " + name)
			next = append(next, d.opaque()...)
		})
		if err != nil {
			return nil, err
		}
		h = next
	}
	return h, nil
}

func (c *client) mkdir(dir []byte, name string) (h []byte, err error) {
	err = c.call(procMkdir, func(e *enc) { e.opaque(dir); e.str(name); e.sattr(0o755, false) }, func(d *dec) {
		d.status("MKDIR " + name)
		h = d.handle()
	})
	return h, err
}
