package nlm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/renameio/v2"

	"krgimage/nfsroot/sunrpc"
)

// The journal is a file of records, each a length (4 bytes, big-endian), a
// CRC-32C of the payload, and the payload in XDR: a kind and its fields. Every
// change of the table is one record, written before the client hears of it.
//
// It is not synced to disk at each lock: what was written survives the end of
// the process, however sudden, and that is what must not lose locks. When the
// machine itself goes down the clients are asked to say what they hold. So that
// they can be asked, a client's first record is synced.
const (
	opBoot    = 1 // bootID, state: the machine's life in which the next records were written
	opClient  = 2 // client
	opLock    = 3 // file, lock
	opUnlock  = 4 // file, owner, span
	opWait    = 5 // file, lock, waiter
	opGrant   = 6 // id
	opForget  = 7 // id
	opRelease = 8 // client, state: all locks of the client but those of that state; 0: all
	opShare   = 9 // file, share
	opUnshare = 10
	opDrop    = 11 // client: its locks that were not reclaimed
	opGranted = 12 // id: opGrant has been, with the lock in a record of its own
)

const (
	maxRecord = 16 << 10
	maxString = 2 << 10
	// compactAt is the length in bytes from which the journal is written anew
	// once it has grown to twice what was live.
	compactAt = 256 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// entry is one record.
type entry struct {
	kind   uint32
	file   string
	lock   lock // its owner, span and state serve the kinds that need less, too
	waiter *waiter
	id     uint64
	share  share
	bootID string
}

func (x entry) payload() []byte {
	e := &sunrpc.Encoder{}
	e.Uint32(x.kind)
	client := func(a netip.Addr) { e.Opaque(a.AsSlice()) }
	putLock := func(l lock) {
		client(l.client)
		e.Uint32(uint32(l.svid))
		e.Uint64(l.start)
		e.Uint64(l.end)
		e.Bool(l.exclusive)
		e.Uint32(uint32(l.state))
		e.Bool(l.confirmed)
		e.String(l.oh)
	}
	switch x.kind {
	case opBoot:
		e.String(x.bootID)
		e.Uint32(uint32(x.lock.state))
	case opClient, opDrop:
		client(x.lock.client)
	case opRelease:
		client(x.lock.client)
		e.Uint32(uint32(x.lock.state))
	case opLock, opUnlock:
		e.String(x.file)
		putLock(x.lock)
	case opWait:
		e.String(x.file)
		putLock(x.waiter.want)
		e.Uint64(x.waiter.id)
		e.String(x.waiter.caller)
		e.Opaque(x.waiter.handle)
		e.Uint64(x.waiter.offset)
		e.Uint64(x.waiter.length)
	case opGrant, opForget, opGranted:
		e.Uint64(x.id)
	case opShare, opUnshare:
		e.String(x.file)
		client(x.share.client)
		e.String(x.share.oh)
		e.Uint32(x.share.mode)
		e.Uint32(x.share.access)
	}
	return e.Bytes()
}

func parseEntry(b []byte) (entry, bool) {
	d := sunrpc.NewDecoder(b)
	x := entry{kind: d.Uint32()}
	client := func() netip.Addr {
		a, ok := netip.AddrFromSlice(d.Opaque(16))
		if !ok {
			d.Spoil()
		}
		return a
	}
	getLock := func() lock {
		l := lock{owner: owner{client(), int32(d.Uint32())}, span: span{d.Uint64(), d.Uint64()}}
		l.exclusive, l.state, l.confirmed, l.oh = d.Bool(), int32(d.Uint32()), d.Bool(), d.String(maxString)
		if l.start > l.end || l.end > maxOffset {
			d.Spoil()
		}
		return l
	}
	switch x.kind {
	case opBoot:
		x.bootID, x.lock.state = d.String(maxString), int32(d.Uint32())
	case opClient, opDrop:
		x.lock.client = client()
	case opRelease:
		x.lock.client, x.lock.state = client(), int32(d.Uint32())
	case opLock, opUnlock:
		x.file, x.lock = d.String(maxString), getLock()
	case opWait:
		w := &waiter{file: d.String(maxString), want: getLock(), id: d.Uint64(), caller: d.String(maxString)}
		w.handle = bytes.Clone(d.Opaque(maxString))
		w.offset, w.length = d.Uint64(), d.Uint64()
		x.file, x.waiter = w.file, w
		if w.id == 0 {
			d.Spoil()
		}
	case opGrant, opForget, opGranted:
		x.id = d.Uint64()
	case opShare, opUnshare:
		x.file = d.String(maxString)
		x.share = share{owner: owner{client: client()}, oh: d.String(maxString), mode: d.Uint32(), access: d.Uint32()}
	default:
		d.Spoil()
	}
	return x, !d.Bad() && d.Len() == 0
}

func appendRecord(b []byte, x entry) []byte {
	p := x.payload()
	b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(p, castagnoli))
	return append(b, p...)
}

// state is what a journal holds: the table and who is known.
type state struct {
	*table
	clients map[netip.Addr]bool
	bootID  string
	number  int32 // the server's own state number
}

func newState() *state { return &state{table: newTable(), clients: map[netip.Addr]bool{}} }

// apply does what a record says and returns the files in which locks may have
// become free.
func (s *state) apply(x entry) []string {
	switch x.kind {
	case opBoot:
		s.bootID, s.number = x.bootID, x.lock.state
	case opClient:
		s.clients[x.lock.client] = true
	case opLock:
		s.set(x.file, x.lock)
	case opUnlock:
		s.unset(x.file, x.lock.owner, x.lock.span)
		return []string{x.file}
	case opWait:
		if s.byID[x.waiter.id] == nil {
			s.wait(x.waiter)
		}
	case opGrant:
		if w := s.byID[x.id]; w != nil && !w.granting {
			s.grant(w)
		}
	case opGranted:
		if w := s.byID[x.id]; w != nil {
			w.granting = true
			s.stopWaiting(w)
		}
	case opForget:
		if w := s.byID[x.id]; w != nil {
			s.forget(w)
			return []string{w.file}
		}
	case opRelease:
		touched := s.release(x.lock.client, func(l lock) bool { return x.lock.state == 0 || l.state != x.lock.state })
		if s.held[x.lock.client] == 0 {
			delete(s.clients, x.lock.client)
		}
		return touched
	case opDrop:
		return s.release(x.lock.client, func(l lock) bool { return !l.confirmed })
	case opShare:
		s.setShare(x.file, x.share)
	case opUnshare:
		s.unsetShare(x.file, x.share)
	}
	return nil
}

// snapshot is the shortest journal that makes this state.
func (s *state) snapshot() []byte {
	b := appendRecord(nil, entry{kind: opBoot, bootID: s.bootID, lock: lock{state: s.number}})
	for c := range s.clients {
		b = appendRecord(b, entry{kind: opClient, lock: lock{owner: owner{client: c}}})
	}
	for _, key := range slices.Sorted(maps.Keys(s.files)) {
		f := s.files[key]
		for _, l := range f.locks {
			b = appendRecord(b, entry{kind: opLock, file: key, lock: l})
		}
		for _, w := range f.waiters {
			b = appendRecord(b, entry{kind: opWait, file: key, waiter: w})
			if w.granting {
				b = appendRecord(b, entry{kind: opGranted, id: w.id})
			}
		}
		for _, sh := range f.shares {
			b = appendRecord(b, entry{kind: opShare, file: key, share: sh})
		}
	}
	return b
}

// replay applies the records of a journal up to the first that makes no sense
// and returns the number of bytes that did.
func (s *state) replay(journal []byte) int {
	done := 0
	for {
		rest := journal[done:]
		if len(rest) < 8 {
			return done
		}
		n := binary.BigEndian.Uint32(rest)
		if n > maxRecord || int(n) > len(rest)-8 {
			return done
		}
		p := rest[8 : 8+n]
		if crc32.Checksum(p, castagnoli) != binary.BigEndian.Uint32(rest[4:]) {
			return done
		}
		x, ok := parseEntry(p)
		if !ok {
			return done
		}
		s.apply(x)
		done += 8 + int(n)
	}
}

// journal is the open file. Its user does the locking.
type journal struct {
	path string
	log  *slog.Logger
	f    *os.File // nil: to be written anew
	size int      // bytes
	live int      // bytes when it was last written anew
}

// openJournal reads the journal into a new state. What can't be read is kept
// aside, once.
func openJournal(path string, log *slog.Logger) (*journal, *state, error) {
	s := newState()
	j := &journal{path: path, log: log}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, nil, fmt.Errorf("lock journal: %w", err)
	}
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("lock journal: %w", err)
	}
	if done := s.replay(text); done < len(text) {
		damaged := path + ".damaged"
		log.Error("the end of the lock journal is damaged: the locks before it are kept, what came after is lost",
			"file", path, "kept_bytes", done, "lost_bytes", len(text)-done, "copy", damaged)
		if err := os.WriteFile(damaged, text, 0o600); err != nil {
			log.Warn("no copy of the damaged journal", "err", err)
		}
	}
	return j, s, nil
}

// rewrite replaces the journal by a snapshot.
func (j *journal) rewrite(s *state) error {
	text := s.snapshot()
	if err := renameio.WriteFile(j.path, text, 0o600); err != nil {
		return fmt.Errorf("lock journal: %w", err)
	}
	f, err := os.OpenFile(j.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return fmt.Errorf("lock journal: %w", err)
	}
	j.Close()
	j.f, j.size, j.live = f, len(text), len(text)
	return nil
}

// write appends records. After a failure nothing is known of the file's end,
// so the next write replaces it by a snapshot of the state, which must be the
// one before these records.
func (j *journal) write(s *state, sync bool, entries ...entry) error {
	if j.f == nil || j.size > compactAt && j.size > 2*j.live {
		if err := j.rewrite(s); err != nil {
			j.Close()
			return err
		}
	}
	var b []byte
	for _, x := range entries {
		b = appendRecord(b, x)
	}
	n, err := j.f.Write(b)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	if err == nil && sync {
		err = j.f.Sync()
	}
	if err != nil {
		j.Close()
		return fmt.Errorf("lock journal: %w", err)
	}
	j.size += n
	return nil
}

func (j *journal) Close() {
	if j.f != nil {
		j.f.Close()
		j.f = nil
	}
}
