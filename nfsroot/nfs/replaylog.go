package nfs

import (
	"bytes"
	"cmp"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// replayLog is the replay cache on file: a ring of slots, mapped into memory. To
// note a call costs a copy, and what is noted stays when the process is killed.
// It is of no use after the machine went down, when file system and log need not
// agree any more, so it carries the machine's boot id.
type replayLog struct {
	raw  []byte
	slot []replaySlot
}

// State of a slot.
const (
	slotFree  = 0
	slotBegun = 1 // the call is being done
	slotDone  = 2 // the reply is there
)

// replaySlot is one call: 512 bytes. The state is written last, and taken away
// before anything else changes.
type replaySlot struct {
	state     uint32
	xid, proc uint32
	size      uint32 // of the reply
	peer      [16]byte
	args, seq uint64
	reply     [464]byte // larger than any answer to the calls that are kept
}

// replayHead comes before the slots.
type replayHead struct {
	magic  [16]byte
	bootID [48]byte
}

var replayMagic = [16]byte{'k', 'r', 'g', ' ', 'r', 'e', 'p', 'l', 'a', 'y', 's', ' ', '1'}

// openReplayLog opens the file or begins it anew: one of another boot, or of
// another form, means nothing.
func openReplayLog(path string, slots int) (*replayLog, error) {
	var want replayHead
	want.magic = replayMagic
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("nfs: replay log: %w", err)
	}
	copy(want.bootID[:], strings.TrimSpace(string(id)))

	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("nfs: replay log: %w", err)
	}
	defer f.Close()
	size := int(unsafe.Sizeof(want)) + slots*int(unsafe.Sizeof(replaySlot{}))
	head := (*[unsafe.Sizeof(want)]byte)(unsafe.Pointer(&want))[:]
	have := make([]byte, len(head))
	n, _ := f.ReadAt(have, 0)
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("nfs: replay log: %w", err)
	}
	if n != len(have) || !bytes.Equal(have, head) || info.Size() != int64(size) {
		if err := f.Truncate(0); err != nil {
			return nil, fmt.Errorf("nfs: replay log: %w", err)
		}
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(size)); err != nil { // a hole that finds the disk full would be SIGBUS
		return nil, fmt.Errorf("nfs: replay log %s: %w", path, err)
	}
	if _, err := f.WriteAt(head, 0); err != nil {
		return nil, fmt.Errorf("nfs: replay log: %w", err)
	}
	raw, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("nfs: replay log: map %s: %w", path, err)
	}
	return &replayLog{raw: raw, slot: unsafe.Slice((*replaySlot)(unsafe.Pointer(&raw[len(head)])), slots)}, nil
}

// close unmaps the file; nothing may be noted any more.
func (l *replayLog) close() error { return unix.Munmap(l.raw) }

// load returns the calls of the process before, oldest first.
func (l *replayLog) load() []*replay {
	var all []*replay
	for i := range l.slot {
		s := &l.slot[i]
		if s.state != slotBegun && s.state != slotDone || s.size > uint32(len(s.reply)) || s.seq%uint64(len(l.slot)) != uint64(i) {
			continue
		}
		e := &replay{seq: s.seq, done: make(chan struct{}), cut: s.state == slotBegun,
			key: replayKey{peer: netip.AddrFrom16(s.peer).Unmap(), xid: s.xid, proc: s.proc, args: s.args}}
		if !e.cut {
			e.reply = bytes.Clone(s.reply[:s.size])
			close(e.done)
		}
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b *replay) int { return cmp.Compare(a.seq, b.seq) })
	return all
}

func (l *replayLog) at(e *replay) *replaySlot { return &l.slot[e.seq%uint64(len(l.slot))] }

// begin notes a call; the cache's lock is held.
func (l *replayLog) begin(e *replay) {
	s := l.at(e)
	atomic.StoreUint32(&s.state, slotFree)
	s.xid, s.proc, s.args, s.size = e.key.xid, e.key.proc, e.key.args, 0
	s.peer = e.key.peer.As16()
	atomic.StoreUint64(&s.seq, e.seq)
	atomic.StoreUint32(&s.state, slotBegun)
}

// end notes the answer, unless the call was so slow that its place is another's.
func (l *replayLog) end(e *replay) {
	s := l.at(e)
	if atomic.LoadUint64(&s.seq) != e.seq || len(e.reply) > len(s.reply) {
		return
	}
	s.size = uint32(copy(s.reply[:], e.reply))
	atomic.StoreUint32(&s.state, slotDone)
}
