package configs

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// DiscoverIDs are the node ids that discovery may hand out, ascending and each
// once. Entries that Validate would refuse are left out.
func (c *Cluster) DiscoverIDs() []int {
	var ids []int
	for _, s := range c.Nodes.IDs {
		first, last, bad := parseRange(s)
		if bad != nil {
			continue
		}
		for id := first; id <= last; id++ {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

func formatRange(first, last int) string {
	if first == last {
		return strconv.Itoa(first)
	}
	return fmt.Sprintf("%d-%d", first, last)
}

// parseRange reads "N" or "N-M".
func parseRange(s string) (first, last int, bad *Error) {
	a, b, isRange := strings.Cut(s, "-")
	if !isRange {
		b = a
	}
	first, errA := strconv.Atoi(strings.TrimSpace(a))
	last, errB := strconv.Atoi(strings.TrimSpace(b))
	switch {
	case errA != nil || errB != nil:
		return 0, 0, &Error{Message: quote(s) + " is not a node id or a range of ids", Hint: "for example 7 or 10-40"}
	case first < 0 || first > MaxNodeID || last < 0 || last > MaxNodeID:
		return 0, 0, &Error{Message: fmt.Sprintf("%s leaves the node ids 0..%d", s, MaxNodeID)}
	case first > last:
		return 0, 0, &Error{Message: fmt.Sprintf("the range %s runs backwards", s), Hint: "write " + formatRange(last, first)}
	}
	return first, last, nil
}
