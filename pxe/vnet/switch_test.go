package vnet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"time"
)

var (
	macA  = address{0x52, 0x54, 0, 0, 0, 0xa}
	macB  = address{0x52, 0x54, 0, 0, 0, 0xb}
	all   = address{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	multi = address{0x33, 0x33, 0, 0, 0, 1}
)

func frame(dst, src address, payload string) []byte {
	f := append(dst[:], src[:]...)
	f = append(f, 0x08, 0x00)
	return append(f, payload...)
}

// bench is a switch with three ports and a clock that stands still.
type bench struct {
	sw    *Switch
	ports map[string]*Port
	clock time.Time
}

func newBench(t *testing.T, queue int) *bench {
	t.Helper()
	b := &bench{sw: NewSwitch(queue), ports: map[string]*Port{}, clock: time.Unix(1000, 0)}
	b.sw.now = func() time.Time { return b.clock }
	for _, name := range []string{"a", "b", "c"} {
		p, err := b.sw.Attach(name)
		if err != nil {
			t.Fatal(err)
		}
		b.ports[name] = p
	}
	return b
}

// heard empties the queues and says which ports got something.
func (b *bench) heard() string {
	var s []string
	for _, name := range []string{"a", "b", "c"} {
		p := b.ports[name]
		if p == nil {
			continue
		}
		if len(p.out) > 0 {
			s = append(s, name)
		}
		for len(p.out) > 0 {
			<-p.out
		}
	}
	return strings.Join(s, "")
}

func TestSwitchForwarding(t *testing.T) {
	type step struct {
		do   func(b *bench)
		from string
		f    []byte
		want string
	}
	tests := []struct {
		name  string
		steps []step
	}{
		{"unknown destination floods", []step{{from: "a", f: frame(macB, macA, ""), want: "bc"}}},
		{"broadcast floods", []step{{from: "a", f: frame(all, macA, ""), want: "bc"}}},
		{"multicast floods even when learnt as nothing", []step{{from: "b", f: frame(multi, macB, ""), want: "ac"}}},
		{"learnt destination gets it alone", []step{
			{from: "b", f: frame(all, macB, ""), want: "ac"},
			{from: "a", f: frame(macB, macA, ""), want: "b"},
			{from: "b", f: frame(macA, macB, ""), want: "a"},
		}},
		{"destination behind the same port goes nowhere", []step{
			{from: "a", f: frame(all, macB, ""), want: "bc"},
			{from: "a", f: frame(macB, macA, ""), want: ""},
		}},
		{"a moved address is followed", []step{
			{from: "b", f: frame(all, macB, ""), want: "ac"},
			{from: "c", f: frame(all, macB, ""), want: "ab"},
			{from: "a", f: frame(macB, macA, ""), want: "c"},
		}},
		{"an old entry is forgotten", []step{
			{from: "b", f: frame(all, macB, ""), want: "ac"},
			{do: func(b *bench) { b.clock = b.clock.Add(tableAge + time.Second) }, from: "a", f: frame(macB, macA, ""), want: "bc"},
		}},
		{"traffic keeps an entry young", []step{
			{from: "b", f: frame(all, macB, ""), want: "ac"},
			{do: func(b *bench) { b.clock = b.clock.Add(tableAge * 3 / 4) }, from: "b", f: frame(all, macB, ""), want: "ac"},
			{do: func(b *bench) { b.clock = b.clock.Add(tableAge * 3 / 4) }, from: "a", f: frame(macB, macA, ""), want: "b"},
		}},
		{"group source is not learnt nor forwarded", []step{
			{from: "a", f: frame(macB, multi, ""), want: ""},
			{from: "b", f: frame(multi, macB, ""), want: "ac"},
		}},
		{"runt and giant are dropped", []step{
			{from: "a", f: []byte("short"), want: ""},
			{from: "a", f: make([]byte, MaxFrame+1), want: ""},
		}},
		{"a port that is down neither sends nor receives", []step{
			{do: func(b *bench) { b.ports["b"].SetUp(false) }, from: "a", f: frame(all, macA, ""), want: "c"},
			{from: "b", f: frame(all, macB, ""), want: ""},
			{do: func(b *bench) { b.ports["b"].SetUp(true) }, from: "b", f: frame(all, macB, ""), want: "ac"},
		}},
		{"pulling a cable forgets what was behind it", []step{
			{from: "b", f: frame(all, macB, ""), want: "ac"},
			{do: func(b *bench) { b.ports["b"].SetUp(false); b.ports["b"].SetUp(true) }, from: "a", f: frame(macB, macA, ""), want: "bc"},
		}},
		{"a partition holds both ways and heals", []step{
			{from: "b", f: frame(all, macB, ""), want: "ac"},
			{do: func(b *bench) { b.sw.Partition([]*Port{b.ports["b"]}) }, from: "a", f: frame(all, macA, ""), want: "c"},
			{from: "a", f: frame(macB, macA, ""), want: ""},
			{from: "b", f: frame(all, macB, ""), want: ""},
			{do: func(b *bench) { b.sw.Partition() }, from: "a", f: frame(macB, macA, ""), want: "b"},
		}},
		{"a detached port is gone and what it was known for floods", []step{
			{from: "b", f: frame(all, macB, ""), want: "ac"},
			{do: func(b *bench) { b.sw.Detach(b.ports["b"]); delete(b.ports, "b") }, from: "a", f: frame(macB, macA, ""), want: "c"},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, 8)
			for i, s := range tt.steps {
				if s.do != nil {
					s.do(b)
				}
				b.ports[s.from].Send(s.f)
				if got := b.heard(); got != s.want {
					t.Fatalf("step %d: heard by %q, want %q", i, got, s.want)
				}
			}
		})
	}
}

func TestSwitchCounts(t *testing.T) {
	b := newBench(t, 2)
	for range 5 {
		b.ports["a"].Send(frame(macB, macA, "xx"))
	}
	b.ports["a"].Send(nil)
	if got, want := b.ports["a"].Stats(), (Stats{RxFrames: 5, RxBytes: 80, Malformed: 1}); got != want {
		t.Errorf("sender: %+v, want %+v", got, want)
	}
	if got, want := b.ports["b"].Stats(), (Stats{TxFrames: 2, TxBytes: 32, Dropped: 3}); got != want {
		t.Errorf("receiver: %+v, want %+v", got, want)
	}
	b.ports["c"].SetUp(false)
	b.ports["a"].Send(frame(all, macA, ""))
	if got := b.ports["c"].Stats().Blocked; got != 1 {
		t.Errorf("frames blocked at the pulled cable: %d, want 1", got)
	}
}

func TestSwitchTableIsBounded(t *testing.T) {
	b := newBench(t, 1)
	for i := range tableSize + 100 {
		src := address{0x02}
		binary.BigEndian.PutUint32(src[2:], uint32(i))
		b.ports["a"].Send(frame(all, src, ""))
	}
	if got := len(b.sw.table); got != tableSize {
		t.Fatalf("%d entries, want %d", got, tableSize)
	}
	b.clock = b.clock.Add(tableAge + time.Second)
	b.ports["b"].Send(frame(all, macB, ""))
	if got := len(b.sw.table); got != 1 {
		t.Fatalf("%d entries after all have expired and one came, want 1", got)
	}
}

func TestAttachTwice(t *testing.T) {
	b := newBench(t, 1)
	if _, err := b.sw.Attach("a"); err == nil {
		t.Error("a second port of the same name was accepted")
	}
}

type failAfter struct {
	bytes.Buffer
	writes int
}

func (f *failAfter) Write(p []byte) (int, error) {
	if f.writes--; f.writes < 0 {
		return 0, errors.New("disk full")
	}
	return f.Buffer.Write(p)
}

func TestCapture(t *testing.T) {
	b := newBench(t, 8)
	w := &failAfter{writes: 2}
	if err := b.sw.Capture(w); err != nil {
		t.Fatal(err)
	}
	f := frame(macB, macA, "hello")
	b.ports["a"].Send(f)
	got := w.Bytes()
	if len(got) != 24+16+len(f) {
		t.Fatalf("%d bytes, want a file header, a frame header and the frame", len(got))
	}
	if secs := binary.LittleEndian.Uint32(got[24:]); secs != 1000 {
		t.Errorf("time stamp %d, want 1000", secs)
	}
	if !bytes.Equal(got[40:], f) {
		t.Errorf("frame % x, want % x", got[40:], f)
	}
	b.heard()
	b.ports["a"].Send(f)
	if b.sw.CaptureError() == nil {
		t.Error("the write error is not told")
	}
	if got := b.heard(); got != "bc" {
		t.Errorf("after the capture failed frames go to %q, want bc", got)
	}
}
