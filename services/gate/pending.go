package gate

import (
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// slots bounds the calls that are in work at a time; those beyond aren't noted,
// which matters only if the daemon dies just then.
const slots = 4096

// Pending notes the calls that the gate has received and not answered yet, in a
// file that is mapped into memory: noting costs a few stores, and what is noted
// is there for the next process when this one is killed. The file belongs on a
// tmpfs; it means nothing after a boot.
type Pending struct {
	mu   sync.Mutex
	slot []Call         // the mapped file; ID 0 is a free slot; guarded by mu
	at   map[uint64]int // slot by ID; guarded by mu
	free []int          // guarded by mu
	raw  []byte
}

// OpenPending opens or makes the file.
func OpenPending(path string) (*Pending, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("gate: %w", err)
	}
	defer f.Close()
	size := slots * int(unsafe.Sizeof(Call{}))
	if err := f.Truncate(int64(size)); err != nil {
		return nil, fmt.Errorf("gate: %w", err)
	}
	raw, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("gate: map %s: %w", path, err)
	}
	p := &Pending{raw: raw, slot: unsafe.Slice((*Call)(unsafe.Pointer(&raw[0])), slots), at: map[uint64]int{}}
	for i := slots - 1; i >= 0; i-- {
		if p.slot[i].ID != 0 {
			p.at[p.slot[i].ID] = i
		} else {
			p.free = append(p.free, i)
		}
	}
	return p, nil
}

// Close lets go of the file.
func (p *Pending) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.slot = nil
	return unix.Munmap(p.raw)
}

// left are the calls that a former process left behind.
func (p *Pending) left() []Call {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []Call
	for _, i := range p.at {
		list = append(list, p.slot[i])
	}
	return list
}

func (p *Pending) has(id uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.at[id]
	return ok
}

func (p *Pending) begin(c Call) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.at[c.ID]; ok || len(p.free) == 0 {
		return
	}
	i := p.free[len(p.free)-1]
	p.free = p.free[:len(p.free)-1]
	p.at[c.ID] = i
	id := c.ID
	c.ID = 0
	p.slot[i] = c
	p.slot[i].ID = id // last: with it the slot is valid
}

func (p *Pending) end(id uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i, ok := p.at[id]; ok {
		p.slot[i].ID = 0
		delete(p.at, id)
		p.free = append(p.free, i)
	}
}
