package nfs

import (
	"bytes"
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// READDIR and READDIRPLUS. A cookie is the directory offset that the file
// system gives for the entry (d_off of getdents64): the kernel's file systems
// keep it good while entries come and go, and over restarts. So there is no
// state between calls and the cookie verifier is always zero.

const direntHead = 19 // ino 8, off 8, reclen 2, type 1

// dirent is a directory entry of getdents64.
type dirent struct {
	ino  uint64
	next uint64 // cookie of the entry: where reading goes on after it
	name []byte // valid until the next read
}

// dirents hands the entries after cookie to take until it says no, and reports
// whether the end was reached. hint is about how many bytes of names take wants.
func (f *file) dirents(cookie uint64, hint int, take func(dirent) bool) (eof bool, err error) {
	fd, err := f.readFD()
	if err != nil {
		return false, err
	}
	raw := newBuffer(smallBuffer)
	if hint > smallBuffer {
		raw.grow(maxRecord)
	}
	defer raw.free()
	buf := raw.b[:min(cap(raw.b), max(hint, 4096))]

	f.dirpos.Lock()
	defer f.dirpos.Unlock()
	if _, err := unix.Seek(fd, int64(cookie), unix.SEEK_SET); err != nil {
		if errors.Is(err, unix.EINVAL) {
			return false, errCookie
		}
		return false, err
	}
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			return false, err
		}
		if n == 0 {
			return true, nil
		}
		for p := buf[:n]; len(p) >= direntHead; {
			size := int(binary.NativeEndian.Uint16(p[16:]))
			if size < direntHead || size > len(p) {
				return false, unix.EIO
			}
			name := p[direntHead:size]
			if end := bytes.IndexByte(name, 0); end >= 0 {
				name = name[:end]
			}
			if f.x.tree != nil && bytes.HasPrefix(name, []byte(stagePrefix)) {
				p = p[size:]
				continue
			}
			if !take(dirent{binary.NativeEndian.Uint64(p), binary.NativeEndian.Uint64(p[8:]), name}) {
				return false, nil
			}
			p = p[size:]
		}
	}
}

var errCookie = errors.New("no such directory offset")

// list checks a READDIR's arguments; the directory's attributes are encoded by
// the caller.
func (c *call) list(wire []byte, cookie, verf uint64, attr *unix.Stat_t) (*file, status) {
	dir, st := c.dir(wire)
	if st != ok {
		return dir, st
	}
	dir.readFD() // serves for its attributes too; an error shows later, where it counts
	if err := dir.stat(attr); err != nil {
		return dir, statusOf(err)
	}
	switch {
	case !c.permitted(dir, attr, mayRead):
		return dir, errAcces
	case cookie != 0 && verf != 0, int64(cookie) < 0:
		return dir, errBadCookie
	}
	return dir, ok
}

// Fixed parts of the two replies in bytes: status, attributes, verifier before
// the entries; end of list and eof after them.
const (
	listHead = 4 + 4 + fattr3Size + 8
	listTail = 4 + 4
)

func (c *call) readdir(d *decoder, e *buffer) bool {
	wire, cookie, verf, count := d.opaque(maxHandle), d.u64(), d.u64(), d.u32()
	if d.bad {
		return false
	}
	return c.entries(e, wire, cookie, verf, int(count), int(count), func(dir *file, de dirent, _ bool) {
		e.u64(c.inode(dir, de))
		e.opaque(de.name)
		e.u64(de.next)
	})
}

func (c *call) readdirplus(d *decoder, e *buffer) bool {
	wire, cookie, verf, dircount, maxcount := d.opaque(maxHandle), d.u64(), d.u64(), d.u32(), d.u32()
	if d.bad {
		return false
	}
	return c.entries(e, wire, cookie, verf, int(dircount), int(maxcount), func(dir *file, de dirent, search bool) {
		var attr unix.Stat_t
		var handle []byte
		if search {
			handle = c.entry(dir, string(de.name), &attr)
		}
		ino := attr.Ino
		if handle == nil {
			ino = c.inode(dir, de)
		}
		e.u64(ino)
		e.opaque(de.name)
		e.u64(de.next)
		e.boolean(handle != nil)
		if handle != nil {
			e.fattr3(dir.x, &attr)
		}
		e.boolean(handle != nil)
		if handle != nil {
			e.opaque(handle)
		}
	})
}

// entries is the frame of both: it encodes entries with put while the reply has
// room. dircount bounds the names and cookies alone, maxcount the whole.
func (c *call) entries(e *buffer, wire []byte, cookie, verf uint64, dircount, maxcount int, put func(dir *file, de dirent, search bool)) bool {
	var attr unix.Stat_t
	dir, st := c.list(wire, cookie, verf, &attr)
	maxcount = min(maxcount, maxIO)
	dircount = min(dircount, maxcount)
	start := len(e.b)
	if st == ok {
		search := c.permitted(dir, &attr, mayExec)
		e.grow(min(maxcount, maxIO) + listHead)
		e.u32(uint32(ok))
		e.boolean(true) // from before the listing, as in lookup
		e.fattr3(dir.x, &attr)
		e.u64(0) // cookie verifier
		names, n, full := 0, 0, false
		eof, err := dir.dirents(cookie, dircount, func(de dirent) bool {
			at := len(e.b)
			e.boolean(true)
			put(dir, de, search)
			names += 8 + 4 + padded(len(de.name)) + 8
			if len(e.b)-start+listTail > maxcount || n > 0 && names > dircount {
				e.b, full = e.b[:at], true
				return false
			}
			n++
			return true
		})
		switch {
		case errors.Is(err, errCookie):
			st = errBadCookie
		case err != nil && n == 0:
			st = statusOf(err)
		case full && n == 0:
			st = errTooSmall
		default:
			e.boolean(false)
			e.boolean(eof)
			return true
		}
		e.b = e.b[:start]
	}
	e.u32(uint32(c.note(st)))
	e.postOp(dir)
	return true
}

// inode is an entry's file id. What lies above the export is not shown: the
// root is its own parent.
func (c *call) inode(dir *file, de dirent) uint64 {
	if dir == dir.x.root && string(de.name) == ".." {
		var st unix.Stat_t
		if dir.stat(&st) == nil {
			return st.Ino
		}
	}
	return de.ino
}

// entry finds the handle and attributes of a directory entry, nil when it has
// gone since. It looks in the cache of open files but leaves it as it is: a
// listing of everything must not push out what is in use.
func (c *call) entry(dir *file, name string, attr *unix.Stat_t) []byte {
	if name == "." || name == ".." && dir == dir.x.root {
		if dir.stat(attr) != nil {
			return nil
		}
		return dir.handle()
	}
	dirfd, err := dir.fd()
	if err != nil {
		return nil
	}
	var k birth
	known := false
	if dir.x.tree == nil {
		if k, known, err = statBirth(dir.x, dirfd, name, attr); err != nil {
			return nil
		}
		if known {
			if wire := c.srv.births.get(k); wire != nil {
				return wire
			}
		}
	}
	h, err := dir.handleOf(dirfd, name)
	if err != nil {
		return nil
	}
	if known && h.names(k.ino) {
		wire := c.srv.seal(dir.x, kindOf(attr.Mode), h)
		c.srv.births.add(k, wire)
		return wire
	}
	if f := c.srv.files.cached(dir.x, []byte(h)); f != nil {
		defer f.release()
		if f.stat(attr) != nil {
			return nil
		}
		return f.handle()
	}
	if dir.entryAttr(dirfd, name, h, attr) != nil {
		return nil
	}
	return c.srv.seal(dir.x, kindOf(attr.Mode), h)
}
