package vnet

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// Sizes in bytes. Guests have no offloads over a stream socket (there is no
// virtio header to carry them), so a frame is an MTU of at most 9000 with its
// header and a VLAN tag; anything longer is a broken stream.
const (
	headerSize = 14
	MaxFrame   = 9216
)

const (
	defaultQueue = 4096            // frames: 6 MB, a full TCP window of one guest
	tableSize    = 4096            // learnt addresses; IEEE 802.1D sets no size
	tableAge     = 5 * time.Minute // IEEE 802.1D-2004 table 7-5, default ageing time
)

// address is an Ethernet address as a map key.
type address [6]byte

func (a address) group() bool { return a[0]&1 != 0 }

// Switch is a learning Ethernet switch.
type Switch struct {
	queue int
	now   func() time.Time

	mu     sync.RWMutex
	ports  []*Port           // guarded by mu
	table  map[address]learn // guarded by mu
	pcap   *capture          // guarded by mu; nil: off
	closed bool              // guarded by mu
}

type learn struct {
	port *Port
	seen time.Time
}

// NewSwitch makes a switch without ports. queue is the length of a port's
// output queue in frames, 0 the default.
func NewSwitch(queue int) *Switch {
	if queue <= 0 {
		queue = defaultQueue
	}
	return &Switch{queue: queue, now: time.Now, table: map[address]learn{}}
}

// Port is one socket of the switch: Send puts a frame into the switch, Receive
// takes the next one that the switch sends out here.
type Port struct {
	name string
	sw   *Switch
	out  chan []byte
	gone chan struct{} // closed by Detach

	down  atomic.Bool
	part  atomic.Int32 // ports talk only within one part, see Partition
	stats counters
}

type counters struct {
	rxFrames, rxBytes, txFrames, txBytes, dropped, blocked, malformed atomic.Uint64
}

// Stats counts what went through a port, seen from the guest's side of the
// cable as on a switch: Rx came in from it, Tx went out to it.
type Stats struct {
	RxFrames  uint64 `json:"rx_frames"`
	RxBytes   uint64 `json:"rx_bytes"`
	TxFrames  uint64 `json:"tx_frames"`
	TxBytes   uint64 `json:"tx_bytes"`
	Dropped   uint64 `json:"dropped"`   // the output queue was full
	Blocked   uint64 `json:"blocked"`   // the link was down or the receiver in another part
	Malformed uint64 `json:"malformed"` // too short, too long, or from a group address
}

// Attach adds a port. Names are unique.
func (s *Switch) Attach(name string) (*Port, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fmt.Errorf("virtual network: port %s: the network is closed", name)
	}
	for _, p := range s.ports {
		if p.name == name {
			return nil, fmt.Errorf("virtual network: there is a port %s already", name)
		}
	}
	p := &Port{name: name, sw: s, out: make(chan []byte, s.queue), gone: make(chan struct{})}
	s.ports = append(s.ports, p)
	return p, nil
}

// Detach removes a port. Its Receive ends.
func (s *Switch) Detach(p *Port) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, q := range s.ports {
		if q == p {
			s.ports = append(s.ports[:i:i], s.ports[i+1:]...)
			close(p.gone)
			break
		}
	}
	s.forget(p)
}

// Port returns the port of that name, or nil.
func (s *Switch) Port(name string) *Port {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, p := range s.ports {
		if p.name == name {
			return p
		}
	}
	return nil
}

// Ports lists the ports in the order they were attached.
func (s *Switch) Ports() []*Port {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return append([]*Port(nil), s.ports...)
}

// Partition splits the network: each group of ports forms a part, the ports
// that are in no group form one more, and frames stay within their part. Each
// call replaces the partition before; without groups the network is whole.
func (s *Switch) Partition(groups ...[]*Port) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.ports {
		p.part.Store(0)
	}
	for i, group := range groups {
		for _, p := range group {
			p.part.Store(int32(i + 1))
		}
	}
}

// Capture writes every frame that enters the switch to w as a pcap stream. A
// write error ends the capture, not the network; CaptureError tells.
func (s *Switch) Capture(w io.Writer) error {
	c, err := newCapture(w)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pcap = c
	return nil
}

// CaptureError is the error that ended the capture, if one did.
func (s *Switch) CaptureError() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.pcap.error()
}

// Name is the name the port was attached under.
func (p *Port) Name() string { return p.name }

// Up reports whether the cable is plugged in.
func (p *Port) Up() bool { return !p.down.Load() }

// SetUp plugs or pulls the cable of the port. The guest keeps its carrier: it
// sees silence, as behind a broken switch.
func (p *Port) SetUp(up bool) {
	p.down.Store(!up)
	if !up {
		p.sw.mu.Lock()
		p.sw.forget(p)
		p.sw.mu.Unlock()
	}
}

// Stats returns the port's counters.
func (p *Port) Stats() Stats {
	c := &p.stats
	return Stats{
		RxFrames: c.rxFrames.Load(), RxBytes: c.rxBytes.Load(),
		TxFrames: c.txFrames.Load(), TxBytes: c.txBytes.Load(),
		Dropped: c.dropped.Load(), Blocked: c.blocked.Load(), Malformed: c.malformed.Load(),
	}
}

// Receive waits for the next frame that the switch sends out of this port.
// The frame is shared with other ports: don't write to it.
func (p *Port) Receive(ctx context.Context) ([]byte, error) {
	select {
	case frame := <-p.out:
		return frame, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-p.gone:
		return nil, io.EOF
	}
}

// Send puts a frame into the switch as if it came in on this port. It never
// blocks. The switch keeps the slice.
func (p *Port) Send(frame []byte) {
	if len(frame) < headerSize || len(frame) > MaxFrame {
		p.stats.malformed.Add(1)
		return
	}
	dst, src := address(frame[0:6]), address(frame[6:12])
	if src.group() {
		p.stats.malformed.Add(1)
		return
	}
	p.stats.rxFrames.Add(1)
	p.stats.rxBytes.Add(uint64(len(frame)))
	s := p.sw
	now := s.now()

	s.mu.RLock()
	pcap := s.pcap
	known := s.table[src]
	to := s.table[dst]
	ports := s.ports
	s.mu.RUnlock()

	pcap.write(now, frame)
	if p.down.Load() {
		p.stats.blocked.Add(1)
		return
	}
	// The read lock carries nearly every frame: the table is written only for
	// a new or moved address, or to refresh one that is half as old as may be.
	if known.port != p || now.Sub(known.seen) > tableAge/2 {
		s.learn(src, p, now)
	}
	if !dst.group() && to.port != nil && now.Sub(to.seen) <= tableAge {
		if to.port != p {
			p.forward(to.port, frame)
		}
		return
	}
	for _, q := range ports {
		if q != p {
			p.forward(q, frame)
		}
	}
}

// forward queues the frame on port q.
func (p *Port) forward(q *Port, frame []byte) {
	if q.down.Load() || p.part.Load() != q.part.Load() {
		q.stats.blocked.Add(1)
		return
	}
	select {
	case q.out <- frame:
		q.stats.txFrames.Add(1)
		q.stats.txBytes.Add(uint64(len(frame)))
	default:
		q.stats.dropped.Add(1)
	}
}

// learn notes that src is behind p. A full table gives up its expired entries;
// when there are none the address stays unknown and is flooded to.
func (s *Switch) learn(src address, p *Port, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-p.gone:
		return
	default:
	}
	if _, ok := s.table[src]; !ok && len(s.table) >= tableSize {
		for a, e := range s.table {
			if now.Sub(e.seen) > tableAge {
				delete(s.table, a)
			}
		}
		if len(s.table) >= tableSize {
			return
		}
	}
	s.table[src] = learn{p, now}
}

// forget drops what was learnt of p; the caller holds mu.
func (s *Switch) forget(p *Port) {
	for a, e := range s.table {
		if e.port == p {
			delete(s.table, a)
		}
	}
}

func (s *Switch) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, p := range s.ports {
		close(p.gone)
	}
	s.ports = nil
	clear(s.table)
}
