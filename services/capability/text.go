package capability

import (
	"fmt"
	"strconv"
	"strings"
)

// names are the capabilities' names by number.
var names = [count]string{
	"CHANGE_KERRIGHED_CAP", "CAN_MIGRATE", "DISTANT_FORK", "FORK_DELAY", "CHECKPOINTABLE", "USE_REMOTE_MEMORY",
	"USE_INTRA_CLUSTER_KERSTREAMS", "USE_INTER_CLUSTER_KERSTREAMS", "USE_WORLD_VISIBLE_KERSTREAMS",
	"SEE_LOCAL_PROC_STAT", "DEBUG", "SYSCALL_EXIT_HOOK",
}

func (c Cap) String() string {
	if c < count {
		return names[c]
	}
	return strconv.Itoa(int(c))
}

// Names lists the names of a set in the order of their numbers.
func (m Mask) Names() []string {
	list := []string{}
	for c := range Cap(count) {
		if m.Has(c) {
			list = append(list, c.String())
		}
	}
	return list
}

// Octal is the set as a number in C's octal notation: scripts read it from
// krgcapset's output and hand it back.
func (m Mask) Octal() string { return fmt.Sprintf("0%o", uint32(m)) }

// screen is where lists of names break.
const screen = 80

// List is the names of a set as krgcapset prints them: indented by a tab,
// separated by commas, broken before column 80. It ends without a newline and is
// empty for an empty set.
func (m Mask) List() string {
	var b strings.Builder
	column := 8
	for i, name := range m.Names() {
		width := len(name) + 2
		switch {
		case i == 0:
			b.WriteByte('\t')
		case column+width < screen:
			b.WriteString(", ")
			width += 2
		default:
			b.WriteString("\n\t")
			column = 8
		}
		b.WriteString(name)
		column += width
	}
	return b.String()
}

// String is all sets in krgcapset's form.
func (s Sets) String() string {
	var b strings.Builder
	for _, set := range []struct {
		name string
		mask Mask
	}{
		{"Permitted", s.Permitted},
		{"Effective", s.Effective},
		{"Inheritable Permitted", s.InheritablePermitted},
		{"Inheritable Effective", s.InheritableEffective},
	} {
		fmt.Fprintf(&b, "%s Capabilities: %s\n%s\n", set.name, set.mask.Octal(), set.mask.List())
	}
	return b.String()
}

// Parse reads what people write for a set that was old until now: a number as
// in C (010 octal, 0x10, 16), or names separated by commas, added to the old
// set after a "+", taken from it after a "-", else instead of it. The sign holds
// for the whole list. A word stands for a capability when it begins with its
// name. Words that stand for none are returned and left out.
func Parse(old Mask, text string) (m Mask, unknown []string) {
	if n, err := strconv.ParseUint(strings.TrimPrefix(text, "+"), 0, 32); err == nil && !strings.ContainsAny(text, "_bBoO") {
		return Mask(n), nil
	}
	sign, list := byte(0), text
	if text != "" && (text[0] == '+' || text[0] == '-') {
		sign, list = text[0], text[1:]
	}
	var named Mask
	for word := range strings.SplitSeq(list, ",") {
		if word == "" {
			continue
		}
		if c, ok := find(word); ok {
			named |= Of(c)
		} else {
			unknown = append(unknown, word)
		}
	}
	switch sign {
	case '+':
		return old | named, unknown
	case '-':
		return old &^ named, unknown
	}
	return named, unknown
}

func find(word string) (Cap, bool) {
	for c, name := range names {
		if strings.HasPrefix(word, name) {
			return Cap(c), true
		}
	}
	return 0, false
}
