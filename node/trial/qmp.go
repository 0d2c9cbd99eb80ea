package trial

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// qmp is the control connection to one QEMU: JSON objects, one a line
// (QEMU docs/interop/qmp-spec). Commands carry an id, their answers the same;
// events come in between.
type qmp struct {
	conn    io.ReadWriteCloser
	onEvent func(qmpEvent)
	done    chan struct{} // closed when the reader ended

	mu      sync.Mutex
	next    int                    // guarded by mu
	waiting map[int]chan<- qmpLine // guarded by mu; nil: the connection ended
}

type qmpEvent struct {
	Name string
	At   time.Time
	Data struct {
		Guest  bool   `json:"guest"`
		Reason string `json:"reason"`
	}
}

// qmpLine is any line that QEMU sends.
type qmpLine struct {
	ID     *int            `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

var errQMPClosed = errors.New("QEMU closed its control connection")

// newQMP greets QEMU. onEvent is called from the reader: it must not wait for
// an answer.
func newQMP(ctx context.Context, conn io.ReadWriteCloser, onEvent func(qmpEvent)) (*qmp, error) {
	q := &qmp{conn: conn, onEvent: onEvent, done: make(chan struct{}), waiting: map[int]chan<- qmpLine{}}
	go q.read()
	// QEMU's greeting is an object like any other and nothing we need is in
	// it; the command may be sent before it came.
	if err := q.do(ctx, "qmp_capabilities", nil); err != nil {
		conn.Close()
		return nil, err
	}
	return q, nil
}

func (q *qmp) read() {
	lines := bufio.NewScanner(q.conn)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var l qmpLine
		if json.Unmarshal(lines.Bytes(), &l) != nil {
			continue
		}
		switch {
		case l.Event != "":
			e := qmpEvent{Name: l.Event, At: time.Unix(l.Timestamp.Seconds, l.Timestamp.Microseconds*1000)}
			json.Unmarshal(l.Data, &e.Data)
			q.onEvent(e)
		case l.ID != nil:
			q.mu.Lock()
			c := q.waiting[*l.ID]
			delete(q.waiting, *l.ID)
			q.mu.Unlock()
			if c != nil {
				c <- l
			}
		}
	}
	q.mu.Lock()
	for _, c := range q.waiting {
		close(c)
	}
	q.waiting = nil
	q.mu.Unlock()
	close(q.done)
}

// do sends a command and waits for its answer.
func (q *qmp) do(ctx context.Context, command string, args any) error {
	answer := make(chan qmpLine, 1)
	q.mu.Lock()
	if q.waiting == nil {
		q.mu.Unlock()
		return errQMPClosed
	}
	q.next++
	id := q.next
	q.waiting[id] = answer
	msg := map[string]any{"execute": command, "id": id}
	if args != nil {
		msg["arguments"] = args
	}
	line, err := json.Marshal(msg)
	if err == nil {
		_, err = q.conn.Write(append(line, '\n'))
	}
	if err != nil {
		delete(q.waiting, id)
	}
	q.mu.Unlock()
	if err != nil {
		return fmt.Errorf("QEMU command %s: %w", command, err)
	}
	select {
	case l, ok := <-answer:
		if !ok {
			return errQMPClosed
		}
		if l.Error != nil {
			return fmt.Errorf("QEMU command %s: %s", command, l.Error.Desc)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("QEMU command %s: %w", command, ctx.Err())
	}
}
