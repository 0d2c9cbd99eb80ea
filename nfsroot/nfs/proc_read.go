package nfs

import (
	"golang.org/x/sys/unix"
)

// Procedures that change nothing but READ and READDIR. Attributes need no
// permission (RFC 1813 section 3.3.1).

func (c *call) getattr(d *decoder, e *buffer) bool {
	wire := d.opaque(maxHandle)
	if d.bad {
		return false
	}
	var attr unix.Stat_t
	f, st := c.file(wire)
	if st == ok {
		st = statusOf(f.stat(&attr))
	}
	e.u32(uint32(c.note(st)))
	if st == ok {
		e.fattr3(f.x, &attr)
	}
	return true
}

func (c *call) lookup(d *decoder, e *buffer) bool {
	wire, name := d.opaque(maxHandle), d.name()
	if d.bad {
		return false
	}
	dir, st := c.dir(wire)
	if st != ok {
		e.u32(uint32(c.note(st)))
		e.postOp(dir)
		return true
	}
	var dirAttr, attr unix.Stat_t
	var f *file
	// Taken before: with attributes from after, a client would go on believing
	// in "no such file" when the file has come in between.
	st = statusOf(dir.stat(&dirAttr))
	known := st == ok
	if known {
		f, st = c.child(dir, &dirAttr, name, &attr)
	}
	e.u32(uint32(c.note(st)))
	if st == ok {
		e.opaque(f.handle())
		e.boolean(true)
		e.fattr3(f.x, &attr)
	}
	e.boolean(known)
	if known {
		e.fattr3(dir.x, &dirAttr)
	}
	return true
}

// child finds a name in a directory, whose attributes are given, and takes the
// attributes of what it finds.
func (c *call) child(dir *file, dirAttr *unix.Stat_t, name string, attr *unix.Stat_t) (*file, status) {
	if st := checkName(name); st != ok {
		return nil, st
	}
	if !c.permitted(dir, dirAttr, mayExec) {
		return nil, errAcces
	}
	if name == "." || name == ".." && dir == dir.x.root {
		*attr = *dirAttr
		return dir, ok
	}
	fd, err := dir.fd()
	if err != nil {
		return nil, statusOf(err)
	}
	// The mount ends at the export's directory, so does "..".
	h, err := dir.handleOf(fd, name)
	if err != nil {
		return nil, statusOf(err)
	}
	f := c.hold(c.srv.files.get(dir.x, h, 0))
	if f.stat(attr) != nil {
		return nil, errNoEnt // removed since
	}
	return f, ok
}

// Bits of ACCESS (RFC 1813 section 3.3.4).
const (
	accessRead    = 0x01
	accessLookup  = 0x02
	accessModify  = 0x04
	accessExtend  = 0x08
	accessDelete  = 0x10
	accessExecute = 0x20
)

// accessNeeds are the permissions behind each bit; 0 is never granted.
var accessNeeds = [...]struct{ bit, file, dir uint32 }{
	{accessRead, mayRead, mayRead},
	{accessLookup, 0, mayExec},
	{accessModify, mayWrite, mayWrite | mayExec},
	{accessExtend, mayWrite, mayWrite | mayExec},
	{accessDelete, 0, mayWrite | mayExec},
	{accessExecute, mayExec, 0},
}

func (c *call) access(d *decoder, e *buffer) bool {
	wire, want := d.opaque(maxHandle), d.u32()
	if d.bad {
		return false
	}
	var attr unix.Stat_t
	f, st := c.file(wire)
	if st == ok {
		st = statusOf(f.stat(&attr))
	}
	e.u32(uint32(c.note(st)))
	if st != ok {
		e.boolean(false)
		return true
	}
	e.boolean(true)
	e.fattr3(f.x, &attr)
	var granted uint32
	for _, a := range accessNeeds {
		perm := a.file
		if f.kind() == kindDir {
			perm = a.dir
		}
		if want&a.bit != 0 && perm != 0 && !(perm&mayWrite != 0 && f.x.ReadOnly) && c.permitted(f, &attr, perm) {
			granted |= a.bit
		}
	}
	e.u32(granted)
	return true
}

func (c *call) readlink(d *decoder, e *buffer) bool {
	wire := d.opaque(maxHandle)
	if d.bad {
		return false
	}
	f, st := c.file(wire)
	var target [unix.PathMax]byte
	n := 0
	if st == ok && f.kind() != kindLink {
		st = errInval
	}
	if st == ok {
		fd, err := f.fd()
		if err == nil {
			n, err = f.readLink(fd, target[:])
		}
		st = statusOf(err)
	}
	e.u32(uint32(c.note(st)))
	e.postOp(f)
	if st == ok {
		e.opaque(target[:n])
	}
	return true
}

func (c *call) fsstat(d *decoder, e *buffer) bool {
	f, fs, st, good := c.statfs(d)
	if !good {
		return false
	}
	e.u32(uint32(c.note(st)))
	e.postOp(f)
	if st != ok {
		return true
	}
	unit := uint64(fs.Frsize)
	e.u64(fs.Blocks * unit)
	e.u64(fs.Bfree * unit)
	e.u64(fs.Bavail * unit)
	e.u64(fs.Files)
	e.u64(fs.Ffree)
	e.u64(fs.Ffree)
	e.u32(0) // invarsec: may change at any moment
	return true
}

// statfs decodes a lone handle and asks for its file system.
func (c *call) statfs(d *decoder) (f *file, fs unix.Statfs_t, st status, good bool) {
	wire := d.opaque(maxHandle)
	if d.bad {
		return nil, fs, ok, false
	}
	f, st = c.file(wire)
	if st == ok {
		fd, err := f.fd()
		if err == nil {
			err = unix.Fstatfs(fd, &fs)
		}
		st = statusOf(err)
	}
	return f, fs, st, true
}

// Properties of FSINFO (RFC 1813 section 3.3.19).
const (
	fsfLink        = 0x01
	fsfSymlink     = 0x02
	fsfHomogeneous = 0x08
	fsfCanSetTime  = 0x10
)

func (c *call) fsinfo(d *decoder, e *buffer) bool {
	f, _, st, good := c.statfs(d)
	if !good {
		return false
	}
	e.u32(uint32(c.note(st)))
	e.postOp(f)
	if st != ok {
		return true
	}
	e.u32(maxIO) // rtmax
	e.u32(maxIO) // rtpref
	e.u32(4096)  // rtmult
	e.u32(maxIO) // wtmax
	e.u32(maxIO) // wtpref
	e.u32(4096)  // wtmult
	e.u32(64 << 10)
	e.u64(1<<63 - 1) // maxfilesize: the file system says EFBIG earlier
	e.u32(0)         // time_delta: seconds
	e.u32(1)         // and nanoseconds
	e.u32(fsfLink | fsfSymlink | fsfHomogeneous | fsfCanSetTime)
	return true
}

func (c *call) pathconf(d *decoder, e *buffer) bool {
	f, fs, st, good := c.statfs(d)
	if !good {
		return false
	}
	e.u32(uint32(c.note(st)))
	e.postOp(f)
	if st != ok {
		return true
	}
	links := uint32(32000)
	switch fs.Type {
	case unix.EXT4_SUPER_MAGIC:
		links = 65000
	case unix.BTRFS_SUPER_MAGIC:
		links = 65535
	case unix.XFS_SUPER_MAGIC, unix.TMPFS_MAGIC:
		links = 1<<31 - 1
	}
	e.u32(links)
	e.u32(uint32(min(max(fs.Namelen, 0), 255)))
	e.boolean(true)  // no_trunc: long names are refused
	e.boolean(true)  // chown_restricted
	e.boolean(false) // case_insensitive
	e.boolean(true)  // case_preserving
	return true
}
